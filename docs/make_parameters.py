"""Write docs/parameters.md from the docstrings and signatures of the public functions.

python -m docs.make_parameters           # write the page
python -m docs.make_parameters --check   # exit with 1 if the page is not current
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

# Public names in the order of docs/functions.md, after those of the loss.
NAMES = (
    "fused_fdd_loss",
    "FDDConfig",
    "FDDLossTerms",
    "fused_decoupled_kd",
    "fused_topk_kd",
    "selected_logprobs",
    "row_statistics",
    "RowStatistics",
    "fused_logit_kd",
    "fused_rank_kd",
    "fused_rows",
    "fused_sinkhorn_kd",
    "fused_gold_loss",
    "fused_contrastive_kd",
    "fused_relation_kd",
    "fused_attention_kd",
    "gram_loss",
    "attention_transfer",
    "norm_direction_loss",
    "relational_kd",
    "row_deltas",
    "layer_costs",
    "align_layers",
    "plot_layer_alignment",
    "advantage_kd",
    "WeightSchedule",
    "Stages",
    "GradientBalance",
    "TAIDSchedule",
)
PAGE = Path(__file__).with_name("parameters.md")
TITLE = """# Parameters

Generated from the docstrings by `python -m docs.make_parameters`; edit those.
"""


def sections(docstring: str) -> dict[str, str]:
    """Split a docstring at its headings "Args:", "Returns:", "Raises:"; "" is the text before."""
    parts = re.split(r"^(Args|Returns|Raises):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def entries(section: str) -> list[tuple[str, str]]:
    """Split a section "name, name: text" with indented continuation lines into (names, text)."""
    found: list[tuple[str, str]] = []
    for line in inspect.cleandoc(section).splitlines():
        match = re.match(r"(\*?\*?\w[\w*, ]*): (.*)", line)
        if match:
            found.append((match[1], match[2]))
        elif line.strip():
            names, text = found[-1]
            found[-1] = names, f"{text} {line.strip()}"
    return found


def default_of(names: str, target) -> str:
    """The defaults of some parameters as code, once if they agree; empty where there is none."""
    parameters = inspect.signature(target).parameters
    found = [parameters[name].default for name in names.split(", ") if name in parameters]
    shown = [f"`{value!r}`" for value in found if value is not inspect.Parameter.empty]
    return ", ".join(shown if len(set(shown)) > 1 else shown[:1])


def table(section: str, target) -> str:
    """The parameters of a section as a Markdown table."""
    lines = ["| parameter | default | meaning |", "|---|---|---|"]
    for names, text in entries(section):
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        escaped = text.replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| {shown} | {default_of(names, target)} | {escaped} |")
    return "\n".join(lines)


def described(heading: str, target) -> str:
    """Everything that the docstring of `target` says: text, parameters, result, errors."""
    parts = sections(target.__doc__)
    text = re.sub(r"::$", ":", parts[""].strip(), flags=re.MULTILINE)
    page = [f"## {heading}", text]
    if "Args" in parts:
        page.append(table(parts["Args"], target))
    if "Returns" in parts:
        returned = " ".join(inspect.cleandoc(parts["Returns"]).split())
        page.append(f"**Returns.** {returned}")
    if "Raises" in parts:
        raised = [f"- `{names}`: {text}" for names, text in entries(parts["Raises"])]
        page.append("**Raises.**\n\n" + "\n".join(raised))
    return "\n\n".join(page)


def page() -> str:
    """The text of docs/parameters.md."""
    import fdd_kernels

    found = [described(f"`{name}`", getattr(fdd_kernels, name)) for name in NAMES]
    return "\n\n".join([TITLE.strip(), *found]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    text = page()
    if options.check:
        sys.exit(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
