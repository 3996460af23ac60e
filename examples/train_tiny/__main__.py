"""Make the bundled model: tokenizer, frozen prompts, training, export, figures.

python -m examples.train_tiny --folder build/tiny --processes 2
"""

import argparse
from dataclasses import fields
from pathlib import Path

from torch.multiprocessing.spawn import spawn

from . import figures, freeze
from .export import export
from .model import TinyConfig
from .parallel import free_port, work
from .tokenizer import save_tokenizer, train_tokenizer
from .train import Options


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/tiny"), help="to write into")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes")
    for option in fields(Options):
        if option.name != "folder":
            name = "--" + option.name.replace("_", "-")
            parser.add_argument(name, type=type(option.default), default=option.default)
    return parser.parse_args()


def main() -> None:
    given = vars(parse())
    processes = given.pop("processes")
    options, config = Options(**given), TinyConfig()
    save_tokenizer(train_tokenizer(), options.folder, config.max_length)
    for name, digest in freeze.write(options.folder / "world").items():
        print(digest, name)
    if processes > 1:
        arguments = (options, config, processes, free_port())
        spawn(work, arguments, nprocs=processes)  # type: ignore[no-untyped-call]
    else:
        work(0, options, config, 1, 0)
    export(options.folder, options.folder)
    figures.show(options.folder, "prompts.jsonl")


if __name__ == "__main__":
    main()
