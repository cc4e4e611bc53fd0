"""Yesterday's module paths: each gives its names and one note of where they are now."""

import importlib
import pickle
import sys
import warnings

import pytest

import fdd_kernels
from fdd_kernels import FDDConfig, _moved

# Every module that has moved since commit c2a66e9, with its public functions and classes there, and
# the constants and private names that tests, examples, benchmarks or documents used. Left out:
# `GONE`, constants of the kernel contract that changed their meaning (OWN, SLOPE), and modules
# that stayed at their path. Of those, fdd_kernels.cli and fdd_kernels.testing are packages now with
# the same public names; the names in fdd_kernels.backends are internal to the kernels.
NAMES = {
    "atomic": "UNFINISHED _sync atomic_directory atomic_file clear_unfinished only_process "
    "remove_directory shutil write_text",
    "progress": "Activity",
    "heartbeat": "EVERY Heartbeat",
    "sizes": "GIB MIB parse_count parse_size show",
    "environment": "cache_folder",
    "user_error": "RunStopped SaidElsewhere UserError",
    "spec": "COUNT LSE_S LSE_T LensInputs LensSpec MEAN_S M_DD M_SS M_ST NLL READ_STATS VALUE "
    "count_parts",
    "divergences": "DERIVATIVES DIVERGENCES Divergence FEATURE_DISTANCES TRAJECTORIES is_near "
    "kl_of",
    "distances": "DISTANCES Distance Sums",
    "_extension": "built_for compiler kernels missing_reason origin why_missing",
    "ops": "lens_grad lens_stats",
    "functions": "LensStatistics log_sum_exps",
    "merge": "merge_statistics",
    "vocab_parallel": "SENT_READ_STATS VocabShard first_pass part_statistics second_pass_reads "
    "second_pass_sums",
    "api": "FusedFDDLoss fdd_loss_reference fused_fdd_loss",
    "config": "BACKENDS FDDConfig FDDLossTerms LossOptions",
    "plan": "DEBUG_SWITCH Plan check_labels describe make_plan",
    "terms": "RowTerms TermWeights combine divisor_of row_terms_from_statistics static_deltas "
    "term_weights upstream_gradients",
    "reference": "dense_logits dense_row_terms distance_of",
    "teacher_statistics": "StatisticsLoss StatisticsMaker check_options statistics_widths",
    "models.batches": "check_batch check_positions check_tokens",
    "models.capture": "capture_states",
    "models.compiled": "compile_blocks",
    "models.heads": "Head read_head",
    "models.offload": "device_of end_forward has_place is_offloaded materialised",
    "models.positions": "attended_positions counted_positions counting_rows next_labels "
    "precedes_label token_shape",
    "models.routers": "RouterLoss router_coefficient",
    "models.sharing": "as_teacher_of_itself shares_modules",
    "models.tail": "Recording Slot Step Steps final_state first_tensor",
    "models.teachers": "LiveTeacher StudentSide Teacher TeacherWithHead as_teacher model_states "
    "place_teacher require_model",
    "models.lens": "LogitTransform ModelLens configured_transform evaluating unwrap",
    "models.parallel": "data_parallel forward_replaced inside_forward own_rows refuse_flattened "
    "refuse_partitioned require_gathered whole",
    "distiller": "Distiller DistillerTerms",
    "layers": "layer_grid paired_layers require_layers",
    "planner.loss": "HEAD_PRODUCT_BYTES LossMemory LossShape MIB dense_tensors input_bytes "
    "loss_memory",
    "planner.models": "ModelShape model_from_config read_model",
    "planner.step": "Advice Setup advise most_tokens step_memory",
    "planner.command": "add_plan run_plan",
    "doctor": "_version examine examine_backend print_findings",
    "loading": "as_user_error computing_dtype embeddings first_line fit_vocabularies load_model "
    "load_student load_vocabulary open_cache require_shared window_length with_lora",
    "vocabulary": "Vocabulary shared_vocabulary",
    "teacher_options": "TeacherOptions load_teacher",
    "parsing": "Parser add_options described did_you_mean flag in_flags number numbers "
    "option_fields size with_hyphens word",
    "distill_command.run": "KEPT_CHECKPOINTS _ResumableTrainer distill",
    "distill_command.run_folder": "DistillOptions require_more run_record settle_run steps_of",
    "distill_command.options": "DistillOptions",
    "distill_command.processes": "Processes require_data_parallelism together",
    "distill_command.identity": "model_identity same_model",
    "distill_command.model_card": "model_card",
    "teacher_cache.cache": "KIND TeacherCache WindowCache layer_name",
    "teacher_cache.index": "ArraySpec damaged_files differences plan_shards read_index "
    "stored_tensors",
    "teacher_cache.opening": "open_teacher_cache",
    "teacher_cache.statistics": "KIND StatisticsCache head_digest write_statistics_cache",
    "teacher_cache.storage": "CacheWriter ShardBuffer save_file",
    "teacher_cache.command": "CacheOptions cache_teacher verify_cache",
    "teacher_cache.options": "CacheOptions STORED",
    "data.progress": "read_windows",
}
# Internals whose signature has changed: an old call of them cannot work.
GONE = {
    "functions": "LogSumExps LossAndGradient rows_to_keep tensors_of",
    "plan": "check_normaliser lay_out",
    "spec": "Read",
    "teacher_cache.statistics": "CachedRows TeacherStatistics",
    "terms": "normaliser_of",
    "vocab_parallel": "plan_shard",
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
    assert GONE.keys() <= NAMES.keys()
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
        resolved = [name for name in GONE.get(old, "").split() if hasattr(module, name)]
    assert not resolved, f"{resolved} are there: move them to NAMES"
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


def test_the_names_of_backends_are_those_of_the_registry():
    with pytest.warns(DeprecationWarning, match=r"config is now"):
        from fdd_kernels.config import BACKENDS
    assert isinstance(BACKENDS, tuple)
    assert set(BACKENDS) >= {"auto", "reference", "torch", "cpu", "triton"}


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
    from fdd_kernels.data.records import Message  # noqa: F401
    from fdd_kernels.testing import (  # noqa: F401
        PERTURBATIONS,
        Outcome,
        Problem,
        evaluate,
        random_problem,
    )

    for name in fdd_kernels.__all__:
        assert getattr(fdd_kernels, name) is not None
