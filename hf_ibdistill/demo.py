"""A page that shows what a classifier predicts for an image, and where the tokens of a student look."""

import base64
import html
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
import numpy as np
import PIL.Image
import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from .checks import check_installed, check_numbers
from .data.classes import config_class_names
from .data.folders import find_images
from .data.sources import public_name
from .evaluation import forward_with_attention
from .files import user_path
from .images.decoding import decode_image
from .images.preprocessing import pixel_values
from .models.modeling_ibvit import IBViTForImageClassification
from .students import check_fit
from .teachers import (
    Teacher,
    TeacherLike,
    available_device,
    explain_loading,
    load_classifier,
    load_teachers,
    require_model,
)


if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

# Larger images are refused before they are decoded. A pixel takes three bytes, and phones make up to 50 million.
MAX_PIXELS = 64_000_000
# Seconds between looking for old uploads, and their age when they are deleted.
_DELETION = (60, 300)
_CLASSES_SHOWN = 5
_MOST_EXAMPLES = 24
_PICTURE_SIDE = 288
_CHOOSE_ANOTHER = "Choose a JPEG, PNG or WebP file."


class Reading(NamedTuple):
    """What one part of a model, or a teacher, predicts for an image.

    Attributes:
        title: the part.
        probabilities: (class, probability) of each class, in the order of the logits. Two classes may share a name.
        milliseconds: how long the model took; `None` for a part of a model.
        attention: (height / patch, width / patch), the attention of a token to the patches; `None` for other parts.
    """

    title: str
    probabilities: list[tuple[str, float]]
    milliseconds: float | None = None
    attention: np.ndarray | None = None


def read_upload(path: str | os.PathLike) -> PIL.Image.Image:
    """Decode an uploaded file into an RGB image.

    Raises:
        ValueError: the file is gone, no image, damaged or of more than `MAX_PIXELS`, in a sentence without its path.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError("The image is no longer here. Choose it again.") from error
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
    except PIL.Image.DecompressionBombError:
        pixels = 2 * PIL.Image.MAX_IMAGE_PIXELS
    except Exception:  # which error a damaged file raises depends on its format; decoding names it
        pixels = 0
    if pixels > MAX_PIXELS:
        raise ValueError(f"The image has more than {MAX_PIXELS // 10**6} million pixels. Choose a smaller one.")
    try:
        return decode_image({"bytes": content, "path": None})
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}. {_CHOOSE_ANOTHER}") from error


def explain(
    image: PIL.Image.Image,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    teachers: Sequence[Teacher] = (),
) -> list[Reading]:
    """Run a classifier and teachers on an image, each once.

    Args:
        image: the image.
        model: a student, or any image classifier.
        image_processor: its image processor.
        teachers: teachers with the same classes.

    Returns:
        First the prediction of the model, then those of its tokens, if it has any, then those of the teachers.
    """
    names = config_class_names(model.config)
    processors = {"": image_processor, **{teacher.name: teacher.image_processor for teacher in teachers}}
    pixels = pixel_values([image], processors)

    def probabilities(logits):
        return list(zip(names, logits.flatten().float().softmax(-1).tolist()))

    start = time.perf_counter()
    if isinstance(model, IBViTForImageClassification):
        outputs, maps = forward_with_attention(model, pixels[""])
        tokens = [outputs.class_logits]
        if outputs.teacher_token_logits is not None:
            tokens += outputs.teacher_token_logits.unbind(1)
        logits = outputs.logits.cpu()
    else:
        with torch.inference_mode():
            # Logits come first, also in the tuples of a model with `return_dict=False`.
            logits = model(pixel_values=pixels[""].to(model.device, model.dtype))[0].cpu()
        tokens, maps = [], {}
    milliseconds = 1000 * (time.perf_counter() - start)
    title = "Fused prediction" if len(tokens) > 1 else "Prediction"
    readings = [Reading(title, probabilities(logits), milliseconds)]
    for (name, attention), token_logits in zip(maps.items(), tokens):
        title = "Class token" if name == "class token" else f"Token of {name}"
        readings.append(Reading(title, probabilities(token_logits), attention=attention[0]))
    for teacher in teachers:
        start = time.perf_counter()
        logits = teacher.logits(pixels[teacher.name]).cpu()
        milliseconds = 1000 * (time.perf_counter() - start)
        readings.append(Reading(f"Teacher {teacher.name}", probabilities(logits), milliseconds))
    return readings


def seen_image(image: PIL.Image.Image, image_processor: BaseImageProcessor) -> PIL.Image.Image:
    """The image as a student sees it: resized and cut by its image processor, in RGB."""
    pixels = image_processor([image], do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    return PIL.Image.fromarray(np.moveaxis(pixels, 0, -1).clip(0, 255).astype(np.uint8))


def draw_attention(picture: PIL.Image.Image, attention: np.ndarray) -> PIL.Image.Image:
    """A gray picture, colored by an attention map (rows, columns) in the colors of viridis, which differ in brightness as
    well. Yellow is the largest value of the map."""
    scale = _PICTURE_SIDE / max(picture.size)
    size = [max(1, round(scale * side)) for side in picture.size]
    gray = (
        np.asarray(picture.convert("L").resize(size, PIL.Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    )
    share = attention.astype(np.float32) / max(float(attention.max()), 1e-12)
    share = np.asarray(PIL.Image.fromarray(share).resize(size, PIL.Image.Resampling.BICUBIC)).clip(0, 1)
    colors = matplotlib.colormaps["viridis"](share)[..., :3]
    return PIL.Image.fromarray(np.rint(255 * (0.45 * gray + 0.55 * colors)).astype(np.uint8))


def describe_attention(attention: np.ndarray) -> str:
    """A map (rows, columns) in words: the share of its attention that a token gives to the patches, and the ninth of the
    image where a patch gets the most on average."""
    thirds = [(3 * (np.arange(size) + 0.5) / size).astype(int) for size in attention.shape]
    ninths = {
        f"{vertical} {horizontal}": attention[np.ix_(thirds[0] == i, thirds[1] == j)].mean()
        for i, vertical in enumerate(("top", "middle", "bottom"))
        for j, horizontal in enumerate(("left", "center", "right"))
        # A map of one or two rows has no patch in some of them.
        if i in thirds[0] and j in thirds[1]
    }
    return f"{100 * attention.sum():.0f} % of its attention is on the image, strongest at the {max(ninths, key=ninths.get)}"


def build_demo(
    model: PreTrainedModel | str | os.PathLike,
    image_processor: BaseImageProcessor | None = None,
    *,
    teachers: Mapping[str, TeacherLike] | None = None,
    examples: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
) -> "gradio.Blocks":
    """A page of Gradio: choose an image, and see the prediction of a classifier. For a student with tokens it shows the
    prediction and the attention of each token. [`start_demo`] serves it.

    Args:
        model: a student or any other image classifier, its folder or its Hub id.
        image_processor: its image processor; by default that of the folder or Hub id.
        teachers: name → teacher, as in [`load_teachers`], to show beside the model.
        examples: a folder of images to choose from.
        trust_remote_code: run the code of the repositories of models and teachers.

    Raises:
        ImportError: gradio is not installed.
        ValueError: a model cannot be used, a teacher has other classes, or there is no image among the examples.
        OSError: a model cannot be found.
    """
    check_installed("gradio", extra="demo")
    import gradio as gr

    if isinstance(model, (str, os.PathLike)):
        name = user_path(model, "model")
        model = load_classifier(name, trust_remote_code=trust_remote_code)
        if image_processor is None:
            with explain_loading("The image processor", name):
                image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    else:
        require_model(model)
        name = model.name_or_path or type(model).__name__
    if image_processor is None:
        raise ValueError("image_processor=None, but the model is no folder or Hub id. Pass its image processor.")
    teachers = load_teachers(teachers, trust_remote_code=trust_remote_code) if teachers else []
    names = config_class_names(model.config)
    for teacher in teachers:
        teacher.match_classes(names)
    images = _list_examples(examples)
    device = available_device()
    for network in (model, *(teacher.model for teacher in teachers)):
        network.to(device).eval()
    check_fit(model, image_processor)
    # The first pass of a network is slower than the others, and a teacher that fails does so now.
    explain(PIL.Image.new("RGB", (64, 64), "gray"), model, image_processor, teachers)

    def predict(upload):
        if not upload:
            return _message("There is no image. Choose one, then press Predict."), ""
        try:
            image = read_upload(upload.get("path") or "")
            readings = explain(image, model, image_processor, teachers)
            has_maps = any(reading.attention is not None for reading in readings)
            picture = seen_image(image, image_processor) if has_maps else None
            return _status(readings), _results(readings, picture)
        except ValueError as error:
            return _message(str(error)), ""
        except Exception as error:  # whatever the code of any model raises
            logger.exception("The model fails on an image.")
            return _message(f"The model fails on this image ({type(error).__name__}). Choose another one."), ""

    title = f"Demo of {public_name(name)}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=_DELETION) as page:
        gr.HTML(_header(title, model, names, teachers), apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                image = gr.Image(
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=300,
                    buttons=["fullscreen"],
                    placeholder="Drop an image here, or press to choose one",
                    alt_text="The chosen image",
                    elem_id="image",
                )
                button = gr.Button("Predict", variant="primary", elem_id="predict")
                if images:
                    gr.Examples([[path] for path in images], image, examples_per_page=len(images), elem_id="examples")
            with gr.Column(scale=2, min_width=300):
                status = gr.HTML(_READY, elem_id="status", js_on_load=_ANNOUNCE, apply_default_css=False)
                results = gr.HTML("", elem_id="results", apply_default_css=False)
        # The file as it was sent: Gradio itself would decode it first, and show its errors.
        how = {"preprocess": False, "api_visibility": "private", "concurrency_limit": 1}
        predicted = button.click(
            predict, image, [status, results], show_progress="minimal", show_progress_on=status, **how
        )
        predicted.then(None, js=_SHOW_STATUS, api_visibility="private")
        # A prediction must not stay beside another image.
        image.change(
            None, None, [status, results], js=f"() => [{_READY!r}, '']", api_visibility="private", queue=False
        )
        if images:
            # Gradio gives the buttons of examples a picture alone.
            labels = json.dumps([f"Example {Path(path).stem}" for path in images])
            name = "(button, i) => button.setAttribute('aria-label', names[i])"
            page.load(
                None,
                js=f"() => {{ const names = {labels}; document.querySelectorAll('#examples button').forEach({name}); }}",
                api_visibility="private",
            )
    return page


def start_demo(
    page: "gradio.Blocks", *, host: str | None = None, port: int | None = None, max_file_size: float = 10
) -> str:
    """Serve the page of [`build_demo`] in the background of this process; `page.block_thread()` waits until it is stopped.

    Args:
        page: the page.
        host: the address to listen on; by default that of the environment variable GRADIO_SERVER_NAME, or this machine
            alone.
        port: by default the first free one from 7860.
        max_file_size: the largest upload in MB.

    Returns:
        The address of the page.

    Raises:
        ValueError: `max_file_size` or `port` is out of range.
        OSError: the port is taken.
    """
    import gradio as gr

    check_numbers(0.001, max_file_size=max_file_size)
    if port is not None:
        check_numbers(1, 65535, whole=True, port=port)
    # Fonts of the system: the page works without a network.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts)
    # Darker than its default, so that the contrast of the text is above 4.5.
    theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_dark="*primary_600")
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        max_file_size=round(max_file_size * 2**20),
        theme=theme,
        css=_CSS,
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return url


def _list_examples(folder) -> list[str]:
    if folder is None:
        return []
    path = Path(user_path(folder, "examples"))
    images = find_images(path)[0] if path.is_dir() else []
    if not images:
        raise ValueError(f"examples={folder} is no folder with images that Pillow opens. Give another folder.")
    if len(images) > _MOST_EXAMPLES:
        logger.warning("examples=%s: the first %d of %d images are shown.", folder, _MOST_EXAMPLES, len(images))
    return images[:_MOST_EXAMPLES]


# The page. Every text of a model is escaped, because the author of a model is not that of the page.

_READY = '<p class="note">Choose an image, then press Predict.</p>'
# A screen reader announces what appears in it.
_ANNOUNCE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
# On a phone the result is below the examples.
_SHOW_STATUS = """() => {
  const status = document.getElementById("status");
  if (status.getBoundingClientRect().top > innerHeight / 2) status.scrollIntoView();
}"""
_CSS = """
.gradio-container { max-width: 1180px !important; margin-inline: auto !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
.demo-header h1 { font-size: 1.5rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.demo-header p, #status p, #results p { margin: .25rem 0 0; color: var(--body-text-color); overflow-wrap: anywhere; }
#status p { font-size: 1.05rem; }
#status p.bad { border-left: 4px solid #c2410c; padding-left: .6rem; }
#results .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13.5rem), 1fr)); gap: 1rem;
  margin-top: .6rem; }
#results section { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem;
  background: var(--block-background-fill); min-width: 0; }
#results h2 { font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; display: flex; justify-content: space-between;
  gap: .5rem; overflow-wrap: anywhere; }
#results h2 small { font-size: .85rem; font-weight: 400; white-space: nowrap; }
#results p.legend { margin-top: .8rem; }
#results table { width: 100%; border-collapse: collapse; font-size: .9rem; table-layout: fixed; }
#results th, #results td { padding: .15rem 0; font-weight: 400; text-align: left; border: 0; }
#results tr:first-child th, #results tr:first-child td { font-weight: 600; }
#results th { overflow-wrap: anywhere; padding-right: .4rem; }
#results col + col { width: 4rem; }
#results td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
#results .bar { display: block; height: .45rem; border-radius: 3px; background: var(--border-color-primary); margin-bottom: .15rem; }
#results .bar i { display: block; height: 100%; border-radius: 3px; background: #2563eb; }
.dark #results .bar i { background: #60a5fa; }
#results figure { margin: 0 0 .6rem; }
#results img { width: 100%; border-radius: 6px; display: block; }
#results figcaption { font-size: .82rem; margin-top: .3rem; }
#results .scale { display: inline-block; width: 5rem; height: .6rem; border-radius: 3px; vertical-align: baseline;
  background: linear-gradient(to right, #440154, #3b528b, #21918c, #5ec962, #fde725); }
.hidden-text { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""


def _header(title, model, names, teachers):
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    others = f" Teachers: {', '.join(teacher.name for teacher in teachers)}." if teachers else ""
    return (
        f'<header class="demo-header"><h1>{html.escape(title)}</h1><p>{model.num_parameters():,} parameters, '
        f"{len(names)} classes: {html.escape(shown)}.{html.escape(others)} Uploads are deleted after a few minutes."
        "</p></header>"
    )


def _message(text):
    return f'<p class="bad">{html.escape(text)}</p>'


def _status(readings):
    fused = readings[0]
    best, share = max(fused.probabilities, key=lambda pair: pair[1])
    return (
        f'<p>Predicted <strong id="prediction">{html.escape(best)}</strong> with {_percent(share)} '
        f"in {fused.milliseconds:.1f} ms.</p>"
    )


def _results(readings, picture):
    first, *others = readings
    cards = "".join(_card(reading, picture) for reading in others)
    legend = ""
    if picture is not None:
        legend = (
            '<p class="legend">Attention of each token in the last layer: low <span class="scale" aria-hidden="true"></span> high. '
            "Each map has its own scale.</p>"
        )
    return f'{_card(first, None)}{legend}<div class="cards">{cards}</div>'


def _card(reading, picture):
    title, figure = html.escape(reading.title), ""
    if reading.attention is not None:
        words, encoded = describe_attention(reading.attention), io.BytesIO()
        draw_attention(picture, reading.attention).save(encoded, "JPEG", quality=88)
        source = f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        alt = f"Attention map of the {title[0].lower()}{title[1:]} over the image"
        figure = f'<figure><img src="{source}" alt="{alt}"><figcaption>{words}.</figcaption></figure>'
    best = sorted(reading.probabilities, key=lambda pair: -pair[1])[:_CLASSES_SHOWN]
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}<span class="bar" aria-hidden="true">'
        f'<i style="width: {100 * share:.1f}%"></i></span></th><td>{_percent(share)}</td></tr>'
        for name, share in best
    )
    took = "" if reading.milliseconds is None else f"<small>{reading.milliseconds:.1f} ms</small>"
    return (
        f"<section><h2><span>{title}</span> {took}</h2>{figure}<table><caption class='hidden-text'>{title}: the most probable "
        f"classes</caption><colgroup><col><col></colgroup><tbody>{rows}</tbody></table></section>"
    )


def _percent(share):
    return f"{100 * share:.1f} %"
