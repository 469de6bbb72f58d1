"""The model card of an exported folder: README.md as the Hugging Face Hub shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from m3i_scale.config import Config, Target
from m3i_scale.models.vit import ViT
from m3i_scale.transfer.formats import backbone_class
from m3i_scale.transfer.loading import Which

PAPER = "Towards All-in-one Pre-training via Maximizing Multi-modal Mutual Information"


class Facts(NamedTuple):
    """What the card says besides the configuration."""

    format: str  # m3i, timm, transformers, onnx
    which: Which
    step: int
    dtype: str
    parameters: int
    pooling: bool  # whether the attention pooling is in the files
    figures: str  # the section "Results", or ""


_LIBRARY = {"m3i": "m3i_scale", "timm": "timm", "transformers": "transformers", "onnx": "onnx"}
_PROCESSOR = 'processor = transformers.CLIPImageProcessor.from_pretrained(".")'
_PIXELS = 'processor(Image.open("photo.jpg"), return_tensors="pt").pixel_values'
_LOAD = {
    "m3i": f"""import m3i_scale, transformers
from PIL import Image

backbone = m3i_scale.load_backbone(".").eval()
{_PROCESSOR}
tokens = backbone.features({_PIXELS})
""",
    "timm": """import timm
{integration}from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.forward_features(transform(Image.open("photo.jpg").convert("RGB"))[None])
""",
    "transformers": """import transformers
{integration}from PIL import Image

model = transformers.AutoModel.from_pretrained(".").eval()
processor = transformers.AutoImageProcessor.from_pretrained(".")
output = model(**processor(Image.open("photo.jpg"), return_tensors="pt"))
""",
    "onnx": f"""import onnxruntime, transformers
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx")
{_PROCESSOR}
tokens, *pooled = session.run(None, {{"images": {_PIXELS}.numpy()}})
""",
}
_HUB = {
    "m3i": '`huggingface_hub.snapshot_download("OWNER/NAME")` in place of `"."`',
    "timm": '`"hf-hub:OWNER/NAME"` in place of `"local-dir:."`',
    "transformers": '`"OWNER/NAME"` in place of `"."`',
    "onnx": 'the folder `huggingface_hub.snapshot_download("OWNER/NAME")`',
}
_INTEGRATIONS = {
    "timm": "m3i_scale.integrations.timm_models",
    "transformers": "m3i_scale.integrations.hf",
}


def card(config: Config, facts: Facts) -> str:
    """README.md: what the model is, what it was trained on, its figures, how to load it."""
    is_vit = backbone_class(config) is ViT
    sections = [
        _front_matter(config, facts),
        f"# {config.run}: {config.model.backbone.name}\n",
        _what(config, facts, is_vit),
        _load(facts, is_vit),
        _training(config),
        facts.figures,
    ]
    return "\n".join(section for section in sections if section)


def figures(run: Path, which: Which, step: int) -> str:
    """The section with the table of a run's eval.json; "" without one.

    Raises:
        ValueError: eval.json is not what `m3i eval` writes.
    """
    path = run / "eval.json"
    if not path.is_file():
        return ""
    try:
        content = json.loads(path.read_text("utf-8"))
        measured = (content["which"], content["step"])
        rows = [_figures_row(row) for row in content["rows"]]
        conditions = (
            f"{content['queries']['images']:,} held-out images, {content['gallery']['images']:,} "
            f"in the gallery, computed in {content['precision']}"
        )
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not as `m3i eval` writes it ({error!r}); run m3i eval again, or delete it"
        ) from None
    if measured != (which, step):
        return (
            "## Results\n\nNone of these weights: the run was evaluated with the "
            f"{measured[0]} of step {measured[1]:,}.\n"
        )
    head = "| accuracy, % | this model | untrained | chance |\n| --- | ---: | ---: | ---: |\n"
    return f"## Results\n\n{conditions}.\n\n{head}" + "".join(rows)


def _figures_row(row: dict[str, Any]) -> str:
    trained, untrained, chance = (100 * row[name] for name in ("trained", "untrained", "chance"))
    return f"| {row['task']} | {trained:.1f} | {untrained:.1f} | {chance:.1f} |\n"


def _front_matter(config: Config, facts: Facts) -> str:
    tags = ["m3i", config.model.backbone.name, "image-feature-extraction", *_extra_tags(facts)]
    lines = [
        f"library_name: {_LIBRARY[facts.format]}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return "---\n" + "\n".join(lines) + "\n---\n"


def _extra_tags(facts: Facts) -> list[str]:
    return ["onnx"] if facts.format == "onnx" else ["safetensors"]


def _what(config: Config, facts: Facts, is_vit: bool) -> str:
    data = config.data
    lines = [
        f"An image backbone, pre-trained in one stage with M3I ([{PAPER}]"
        "(https://arxiv.org/abs/2211.09807)) by m3i_scale.\n",
        f"- Weights: the {facts.which} of step {facts.step:,}, "
        f"{facts.parameters / 1e6:,.1f} million parameters, {facts.dtype}.",
        f"- Images: RGB from 0 to 1, {data.image_size} x {data.image_size} pixels, "
        f"{data.augmentation.interpolation}, minus {_triple(data.mean)}, divided by "
        f"{_triple(data.std)}.",
        f"- Features: {_features(facts, is_vit)}",
    ]
    return "\n".join(lines) + "\n"


def _triple(values: tuple[float, float, float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _features(facts: Facts, is_vit: bool) -> str:
    if is_vit and facts.format in _INTEGRATIONS:
        library = {
            "timm": "`VisionTransformer` without a class token",
            "transformers": "`IJepaModel`, a ViT without a class token",
        }[facts.format]
        return (
            f"the tokens after the last norm, of {library}. Their mean is the pooled feature; the "
            "attention pooling of the pre-training has no counterpart there and is not in these "
            "files. At another image size the position embedding is interpolated."
        )
    form = "the stride-16 map" if facts.format in _INTEGRATIONS else "the tokens of its grid"
    if facts.pooling:
        return f"{form}, and the attention pooling of the pre-training."
    return (
        f"{form}. The objective did not train the attention pooling: their mean is the pooled "
        "feature."
    )


def _load(facts: Facts, is_vit: bool) -> str:
    integration = ""
    if facts.format in _INTEGRATIONS and not is_vit:
        integration = f"import {_INTEGRATIONS[facts.format]}  # pip install m3i-scale\n"
    text = _LOAD[facts.format]
    if facts.format in _INTEGRATIONS:
        text = text.format(integration=integration)
    return (
        f"## Load\n\nIn this folder:\n\n```python\n{text}```\n\n"
        f"From the Hub: {_HUB[facts.format]}.\n"
    )


def _training(config: Config) -> str:
    optimizer = config.optimizer
    sources = "".join(
        f"| {source.name} | {_KINDS[source.kind]} | {_share(source.weight, source.epochs)} |\n"
        for source in config.data.sources
    )
    targets = ", ".join(map(_target, config.objective.targets))
    return (
        "## Training\n\n| data | labels | share |\n| --- | --- | --- |\n" + sources + "\n"
        f"- Targets: {targets}.\n"
        f"- Batch {optimizer.global_batch_size:,}, planned for {optimizer.duration}, learning rate "
        f"{optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g}, seed "
        f"{config.seed}.\n"
    )


_KINDS = {"text": "captions", "category": "categories", "both": "captions and categories"}


def _share(weight: float | None, epochs: float) -> str:
    return f"{epochs:g} x its samples" if weight is None else f"weight {weight:g}"


def _target(target: Target) -> str:
    return f"{target.name} ({target.representation}, {target.likelihood.form})"
