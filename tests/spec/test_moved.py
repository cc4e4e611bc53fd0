"""Yesterday's module paths: each gives its names and one note of where they are now."""

import importlib
import pickle
import sys
import warnings

import pytest

import fdd_kernels
from fdd_kernels import FDDConfig, _moved

# Every module that has moved, with the names that tests, examples, benchmarks or documents used.
# Left out: constants of the kernel contract that changed their meaning (OWN, SLOPE), and modules
# that kept their path. Of those, fdd_kernels.cli and fdd_kernels.testing are packages now with the
# same public names; the names in fdd_kernels.backends are internal to the kernels.
NAMES = {
    "atomic": "UNFINISHED _sync atomic_directory atomic_file clear_unfinished only_process "
    "remove_directory shutil write_text",
    "progress": "Activity",
    "heartbeat": "EVERY Heartbeat",
    "sizes": "GIB MIB parse_count parse_size show",
    "environment": "cache_folder",
    "user_error": "RunStopped SaidElsewhere UserError",
    "spec": "COUNT LSE_S LSE_T LensInputs LensSpec MEAN_S M_DD M_SS M_ST NLL Read VALUE",
    "divergences": "DERIVATIVES DIVERGENCES FEATURE_DISTANCES TRAJECTORIES",
    "distances": "DISTANCES Sums",
    "_extension": "built_for kernels missing_reason origin why_missing",
    "ops": "lens_grad lens_stats",
    "functions": "LossAndGradient tensors_of",
    "merge": "merge_statistics",
    "vocab_parallel": "VocabShard first_pass part_statistics second_pass_reads second_pass_sums",
    "api": "FusedFDDLoss fdd_loss_reference fused_fdd_loss",
    "config": "FDDConfig FDDLossTerms LossOptions",
    "plan": "DEBUG_SWITCH Plan check_labels make_plan",
    "terms": "combine normaliser_of row_terms_from_statistics term_weights upstream_gradients",
    "reference": "dense_logits",
    "teacher_statistics": "StatisticsLoss StatisticsMaker statistics_widths",
    "models.batches": "check_batch",
    "models.capture": "capture_states",
    "models.compiled": "compile_blocks",
    "models.heads": "read_head",
    "models.offload": "device_of has_place is_offloaded",
    "models.positions": "counted_positions next_labels",
    "models.routers": "RouterLoss",
    "models.sharing": "shares_modules",
    "models.tail": "Recording",
    "models.teachers": "LiveTeacher model_states",
    "models.lens": "LogitTransform ModelLens configured_transform unwrap",
    "models.parallel": "whole",
    "distiller": "Distiller",
    "layers": "layer_grid paired_layers",
    "planner.loss": "LossShape MIB input_bytes loss_memory",
    "planner.models": "read_model",
    "planner.step": "Setup advise most_tokens step_memory",
    "planner.command": "run_plan",
    "doctor": "_version examine examine_backend print_findings",
    "loading": "fit_vocabularies load_model load_student load_vocabulary with_lora",
    "vocabulary": "shared_vocabulary",
    "teacher_options": "TeacherOptions load_teacher",
    "parsing": "add_options described in_flags",
    "distill_command.run": "KEPT_CHECKPOINTS _ResumableTrainer distill",
    "distill_command.run_folder": "DistillOptions",
    "distill_command.options": "DistillOptions",
    "distill_command.processes": "Processes",
    "distill_command.identity": "model_identity",
    "distill_command.model_card": "model_card",
    "teacher_cache.cache": "KIND TeacherCache WindowCache",
    "teacher_cache.index": "ArraySpec read_index",
    "teacher_cache.opening": "open_teacher_cache",
    "teacher_cache.statistics": "KIND StatisticsCache write_statistics_cache",
    "teacher_cache.storage": "CacheWriter ShardBuffer save_file",
    "teacher_cache.command": "CacheOptions cache_teacher",
    "teacher_cache.options": "CacheOptions STORED",
    "data.progress": "read_windows",
}
PACKAGES = ("models", "planner", "distill_command")


@pytest.fixture(autouse=True)
def unseen(monkeypatch):
    """Old paths that nothing has imported yet."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, _moved._MovedModule):
            monkeypatch.delitem(sys.modules, name)


def test_the_table_is_whole():
    assert {*NAMES, *PACKAGES} == _moved.MOVED.keys()
    assert _moved.SPLIT.keys() <= _moved.MOVED.keys()
    for full in _moved.RENAMED:
        old, _, name = full.rpartition(".")
        assert name in NAMES[old].split()


@pytest.mark.parametrize("old", NAMES)
def test_an_old_path_gives_its_names_and_one_note(old):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        module = importlib.import_module(f"fdd_kernels.{old}")
        missing = [name for name in NAMES[old].split() if not hasattr(module, name)]
    assert not missing, f"say in fdd_kernels/_moved.py where {missing} are now"
    told = [str(note.message) for note in notes if "old path" in str(note.message)]
    new = f"fdd_kernels.{_moved.MOVED[old]}"
    assert told == [f"fdd_kernels.{old} is now {new}; the old path works until the next release"]


def test_the_names_are_the_same_objects():
    with pytest.warns(DeprecationWarning, match=r"fdd_kernels\.config is now") as notes:
        from fdd_kernels.config import FDDConfig as Old
    assert Old is FDDConfig
    assert notes[0].filename == __file__  # where the import stands


def test_every_way_to_import():
    with pytest.warns(DeprecationWarning, match=r"models\.heads is now fdd_kernels\.hf\.heads"):
        from fdd_kernels.models import heads
    assert heads.read_head is importlib.import_module("fdd_kernels.hf.heads").read_head
    names = {}
    with pytest.warns(DeprecationWarning, match=r"sizes is now fdd_kernels\.common\.sizes"):
        exec("from fdd_kernels.sizes import *", names)
    assert names["parse_size"]("1GiB") == 2**30
    with pytest.raises(ImportError, match="no_such_name"):
        from fdd_kernels.sizes import no_such_name  # noqa: F401


def test_pickles_of_yesterday_are_read():
    with pytest.warns(DeprecationWarning, match=r"config is now"):
        assert pickle.loads(b"cfdd_kernels.config\nFDDConfig\n.") is FDDConfig


def test_names_that_have_left_a_module_that_kept_its_path():
    from fdd_kernels.teacher_cache import hidden, identity, writer

    names = dict.fromkeys(
        ("FINAL", "KIND", "TeacherCache", "layer_name", "write_teacher_cache"), hidden
    )
    for name, home in {**names, "describe_model": identity}.items():
        with pytest.warns(DeprecationWarning, match=f"{name} is now in {home.__name__}"):
            assert getattr(writer, name) is getattr(home, name)
    assert writer.tokenizer_digest is identity.tokenizer_digest
    with pytest.raises(ImportError, match="no_such_name"):
        from fdd_kernels.teacher_cache.writer import no_such_name  # noqa: F401


def test_modules_that_are_packages_now():
    from fdd_kernels.cli import NOT_OPTIONS, build_parser, main  # noqa: F401
    from fdd_kernels.testing import Outcome, Problem, evaluate, random_problem  # noqa: F401

    for name in fdd_kernels.__all__:
        assert getattr(fdd_kernels, name) is not None
