"""The model card that goes with an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iv2_jax.models import kinds

_CARD = """\
# InternVideo2 {what}

Video transformer of the InternVideo2 family (arXiv 2403.15377), {count:.1f} M parameters,
exported by iv2_jax {version}{source}.

| | |
|---|---|
| input | {frames} RGB frames of {size} x {size} pixels, normalised as `preprocessing.json` says |
| tokens | {tokens} = 1 + {grid}, width {width}, patch {patch}, tubelet {tubelet} |
| blocks | {depth}, {heads} heads, MLP {mlp}, {gelu} GELU |
| pooled feature | {pool_width} |
{alignments}
## Use

In this folder, with PyTorch{and_safetensors}:

```python
import json, torch, torch_models
{load_import}config, spec = json.load(open("config.json")), json.load(open("preprocessing.json"))
model = torch_models.from_config(config)
model.load_state_dict({load_call})
frames = torch.zeros(1, {frames}, {size}, {size}, 3, dtype=torch.uint8)  # your clip, B T H W RGB
out = model.encode(torch_models.preprocess(frames, spec))  # out.pooled, out.tokens
```

`out.pooled` is (B, {pool_width}); `out.tokens` is (B, {tokens}, {width}), class token first, then
by time, row and column. Tensor names and layouts are those of the original PyTorch
classes{compatible}.

The weights carry whatever rights and biases come from the data and the teachers they were trained
with; see the run that made them.
"""


_GENERAL = """\
# InternVideo2: {what}

A model of the InternVideo2 family (arXiv 2403.15377), {count:.1f} M parameters, exported by iv2_jax
{version}{source}. `config.json` has its sizes and options, `{spec}` what turns raw data
into its inputs.

## Use

In this folder, with {needs}:

```python
{code}
```

`{network}` is plain PyTorch; its docstring says what goes in and what comes out. Tensor names and
layouts are those of the original PyTorch classes.

The weights carry whatever rights and biases come from the data and the teachers they were trained
with; see the run that made them.
"""

_HF_CODE = """\
from transformers import AutoModel
model = AutoModel.from_pretrained(".", trust_remote_code=True).eval()
help(type(model.net).forward)"""

_PLAIN_CODE = """\
import json, torch, torch_models
{load_import}config = json.load(open("config.json"))
model = torch_models.from_config(config)
model.load_state_dict({load_call})
help(type(model).forward)"""


def render(
    contents: Mapping[str, Any], preprocessing: Mapping[str, Any], count: int, source: str
) -> str:
    """Fills the card of a model of any kind.

    Args:
        contents: of config.json.
        preprocessing: of the preprocessing file.
        count: number of parameters.
        source: where the weights come from, or "".
    """
    is_hf = "auto_map" in contents
    if contents["kind"] in ("encoder", "student") and not is_hf:
        return _render_video(contents, preprocessing, count, source)
    code = _HF_CODE if is_hf else _PLAIN_CODE.format(**_loading(contents["weights"]))
    needs = "PyTorch and safetensors" if contents["weights"].endswith("tensors") else "PyTorch"
    return _GENERAL.format(
        what=kinds.get(contents["kind"]).what,
        count=count / 1e6,
        version=contents["version"],
        source=f" from `{source}`" if source else "",
        spec="preprocessor_config.json" if is_hf else "preprocessing.json",
        needs="PyTorch and transformers" if is_hf else needs,
        code=code,
        network="model.net" if is_hf else "model",
    )


def _loading(weights: str) -> dict[str, str]:
    """Lines that load a weight file."""
    if weights.endswith(".safetensors"):
        return {
            "load_import": "from safetensors.torch import load_file\n",
            "load_call": f'load_file("{weights}")',
        }
    return {"load_import": "", "load_call": f'torch.load("{weights}", weights_only=True)'}


def _render_video(
    contents: Mapping[str, Any], preprocessing: Mapping[str, Any], count: int, source: str
) -> str:
    """Fills the card of an encoder or a student.

    Args:
        contents: of config.json.
        preprocessing: of preprocessing.json.
        count: number of parameters.
        source: where the weights come from, or "".
    """
    student = contents["model"] if contents["kind"] == "student" else None
    encoder = student["encoder"] if student else contents["model"]
    side = encoder["image_size"] // encoder["patch_size"]
    times = encoder["num_frames"] // encoder["tubelet"]
    safetensors = contents["weights"].endswith(".safetensors")
    return _CARD.format(
        what="student with its alignment heads" if student else "video encoder",
        count=count / 1e6,
        version=contents["version"],
        source=f" from `{source}`" if source else "",
        frames=preprocessing["num_frames"],
        size=preprocessing["image_size"],
        tokens=1 + times * side * side,
        grid=f"{times} x {side} x {side}",
        width=encoder["width"],
        patch=encoder["patch_size"],
        tubelet=encoder["tubelet"],
        depth=encoder["depth"],
        heads=encoder["num_heads"],
        mlp=encoder["mlp_width"],
        gelu="tanh" if encoder["tanh_gelu"] else "erf",
        pool_width=encoder["pool_width"],
        alignments=_alignments(student) if student else "",
        and_safetensors=" and safetensors" if safetensors else "",
        **_loading(contents["weights"]),
        compatible=_compatible(student),
    )


def _alignments(student: Mapping[str, Any]) -> str:
    """Table rows of the heads."""
    rows = []
    for name in ("clip", "mae"):
        branch = student[name]
        if branch:
            blocks = ", ".join(map(str, branch["layers"]))
            grid = f", on a grid of {tuple(branch['grid'])}" if branch["grid"] else ""
            rows.append(
                f"| {name} heads | {branch['decoder']}, blocks {blocks} to width "
                f"{branch['width']}{grid} |"
            )
    if student["final_width"]:
        rows.append(f"| final head | {student['final_decoder']} to {student['final_width']} |")
    return "\n".join(rows) + "\n"


def _compatible(student: Mapping[str, Any] | None) -> str:
    """Says whether the original's classes run the heads."""
    pooled = student and any(student[name] and student[name]["grid"] for name in ("clip", "mae"))
    return (
        "; the pooling of tokens to a teacher's grid, which the original lacks, has no weights"
        if pooled
        else ""
    )
