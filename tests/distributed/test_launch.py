"""accelerate and torchrun accept the files under examples/launch."""

import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.run import get_args_parser, parse_min_max_nnodes

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", DistributedType.MULTI_GPU), ("fsdp2", DistributedType.FSDP)]
)
def test_accelerate_reads_its_configurations(name, kind):
    # refuses keys that it does not know
    config = load_config_from_file(str(LAUNCH / f"accelerate_{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (2, 16, "bf16")
    # Options that it passes on unchecked: those of `accelerate launch` under the same names.
    known = {
        name.lstrip("-")
        for action in launch_command_parser()._actions
        for name in action.option_strings
    }
    assert set(config.fsdp_config) <= known
    assert set(config.fsdp_config) or kind is not DistributedType.FSDP
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2


def test_torchrun_reads_its_arguments():
    text = (LAUNCH / "torchrun.sh").read_text()
    command = text.split("exec torchrun", 1)[1].replace("\\\n", " ")
    values = {
        "NODES": "2",
        "PROCESSES": "8",
        "HEAD": "node0",
        "PORT": "29500",
        "RUN": "fdd",
        "RESTARTS": "3",
    }
    for name, value in values.items():
        start = command.index(f"${{{name}:-")
        command = command[:start] + value + command[command.index("}", start) + 1 :]
    words = shlex.split(command.replace('"$@"', "examples/trainer.py --output shared"))
    parsed = get_args_parser().parse_args(words)
    assert parse_min_max_nnodes(parsed.nnodes) == (2, 2)
    assert (parsed.nproc_per_node, parsed.rdzv_backend, parsed.rdzv_endpoint) == (
        "8",
        "c10d",
        "node0:29500",
    )
    assert (parsed.rdzv_id, parsed.max_restarts) == ("fdd", 3)
    assert (parsed.training_script, parsed.training_script_args) == (
        "examples/trainer.py",
        ["--output", "shared"],
    )
