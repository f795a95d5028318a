"""What our encoders cost beside bare loops over the same models: images/s and chunks/s.

    python -m simulations.benchmarks.encoders [--images 16] [--repeats 7] [--threads 1 2]

The true architectures with random weights: torchxrayvision's DenseNet-121 over JPEG files of 256 to
1,024 pixels, and BERT-base (12 layers, 768) over a note of full chunks of 512 tokens. Bare loops
are written as the libraries' own pages show; `plain resize` leaves out the slow resize of
torchxrayvision's page (scikit-image, with a crop), and is the one to be measured against. All ways
take turns in one process; ratios are medians over the turns. Threads: a simulation's daemon gives
torch half of the processors, a hospital's own all of them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import skimage
import torch
import torchvision
import torchxrayvision as xrv
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from client.site.encoders.huggingface import HuggingFaceText
from client.site.encoders.inputs import encode_inputs
from client.site.encoders.vault import Vault
from client.site.encoders.xrv import TorchXRayVision
from client.site.shard import Shard, decode_image, write_shard
from common.study import Source
from simulations.benchmarks.dp_step import interleaved

BATCH = 16
WORDS = 30_522  # vocabulary of BERT-base
CHUNKS = 2

Ways = dict[str, Callable[[], None]]


# -- images -------------------------------------------------------------------------------------


def hospital_of_images(folder: Path, count: int) -> Shard:
    """A shard of one patient with so many smooth, slightly noisy JPEGs of 256 to 1,024 pixels."""
    rng = np.random.default_rng(0)
    names = [f"images/{n}.jpg" for n in range(count)]
    files = {}
    for name in names:
        width, height = rng.integers(256, 1025, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=90)
        files[name] = stream.getvalue()
    return write_shard(
        folder / "shard",
        meta={"name": "benchmark", "hospital": "benchmark"},
        records=pl.DataFrame(
            {
                "record_id": ["r"],
                "patient_id": ["p"],
                "stay_id": ["s"],
                "cutoff_hours": [24.0],
                "age": [60.0],
                "sex": ["F"],
                "y_death": [False],
            }
        ),
        images=pl.DataFrame({"stay_id": "s", "hours": 1.0, "path": names, "view": "AP"}),
        files=files,
    )


def readme_pixels(file: Path) -> Tensor:
    """Preprocessing of torchxrayvision's page, `[1, 224, 224]`."""
    image = xrv.datasets.normalize(skimage.io.imread(file), 255)[None]
    transform = torchvision.transforms.Compose(
        [xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(224)]
    )
    return torch.from_numpy(transform(image))


def plain_pixels(file: Path) -> Tensor:
    """The same with torch's resize by area and no crop, `[1, 224, 224]`."""
    image = torch.from_numpy(xrv.datasets.normalize(skimage.io.imread(file), 255))[None, None]
    return functional.interpolate(image, (224, 224), mode="area")[0]


def image_ways(folder: Path, count: int) -> Ways:
    torch.manual_seed(0)
    bare = xrv.models.DenseNet(num_classes=18).eval()
    save_file(bare.state_dict(), folder / "densenet.safetensors")
    name = f"torchxrayvision:{folder / 'densenet.safetensors'}"
    shard = hospital_of_images(folder, count)
    files = sorted((shard.path / "images").iterdir())
    encoder = TorchXRayVision(name.partition(":")[2])
    numbers = itertools.count()

    def loop(pixels: Callable[[Path], Tensor], batch: int = 1) -> None:
        with torch.no_grad():
            for start in range(0, count, batch):
                x_B1HW = torch.stack([pixels(file) for file in files[start : start + batch]])
                torch.relu(bare.features(x_B1HW)).mean((2, 3)).numpy()

    def ours() -> None:
        for file in files:
            encoder.encode([decode_image(file.read_bytes(), file.name)])

    def into_the_vault() -> None:
        source = Source(modality="image", encoder=name, pooling="mean")
        with Vault.open(folder / f"vault-{next(numbers)}") as vault:
            encode_inputs("xray", source, encoder, shard, vault, lambda *_: None)

    return {
        "torchxrayvision, plain resize": lambda: loop(plain_pixels),
        "torchxrayvision, its README": lambda: loop(readme_pixels),
        f"torchxrayvision, plain resize, batch {BATCH}": lambda: loop(plain_pixels, BATCH),
        "Fedward, encoder": ours,
        "Fedward, shard to vault": into_the_vault,
    }


# -- notes --------------------------------------------------------------------------------------


def text_ways(folder: Path) -> Ways:
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=WORDS)).save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += [f"w{n}" for n in range(WORDS - len(vocabulary))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    numbers = np.random.default_rng(0).integers(0, WORDS - 5, 510 * CHUNKS)
    note = " ".join(f"w{n}" for n in numbers)

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    bare: Any = AutoModel.from_pretrained(folder).eval()
    encoder = HuggingFaceText(str(folder), None)
    assert [len(chunk) for chunk in encoder.chunks(note)] == [512] * CHUNKS

    def loop() -> None:
        pieces = tokenizer(note, truncation=True, max_length=512, return_overflowing_tokens=True)
        with torch.no_grad():
            for piece in pieces["input_ids"]:
                bare(torch.tensor([piece])).pooler_output.numpy()

    def ours() -> None:
        encoder.encode([note])

    return {"transformers": loop, "Fedward, encoder": ours}


# -- figures ------------------------------------------------------------------------------------


def measured(title: str, unit: str, ways: Ways, amount: int, repeats: int) -> Table:
    """Rates of all ways; ratios to the first one."""
    seconds = interleaved(ways, repeats)
    reference = seconds[next(iter(ways))]
    table = Table(title=title)
    table.add_column("")
    table.add_column(unit, justify="right")
    table.add_column("of the first", justify="right")
    for way, values in seconds.items():
        rate = amount / statistics.median(values)
        # Medians of ratios within a turn: what the machine does meanwhile cancels.
        ratio = statistics.median(r / v for r, v in zip(reference, values, strict=True))
        table.add_row(way, f"{rate:.1f}", f"{ratio:.2f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one table per modality and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    processors = os.cpu_count() or 1
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({max(1, processors // 2), processors})
    )
    given = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bert").mkdir()
        images, notes = image_ways(Path(folder), given.images), text_ways(Path(folder) / "bert")
        for threads in given.threads:
            torch.set_num_threads(threads)
            with_threads = f"{threads} thread{'s' * (threads > 1)}"
            console.print(
                measured(
                    f"DenseNet-121, {with_threads}", "images/s", images, given.images, given.repeats
                )
            )
            console.print(
                measured(f"BERT-base, {with_threads}", "chunks/s", notes, CHUNKS, given.repeats)
            )


if __name__ == "__main__":
    main()
