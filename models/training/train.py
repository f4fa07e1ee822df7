"""Makes the bundled model again: trains it, writes its GGUF files and measures what it can do.

Run it from the directory above: python -m training.train --out DIRECTORY
"""

import argparse
import json
from pathlib import Path

import torch

from .conversations import Conversations
from .encoding import check
from .evaluation import GreedyModel, accuracy, golden_answers
from .export import NAME, write_gguf
from .model import Llama
from .settings import PUBLISHED, Settings, read_settings
from .stage import train
from .vocabulary import Vocabulary

BUNDLED = Path(__file__).parent.parent / f"{NAME}.Q8_0.gguf"
CHECKED_CONVERSATIONS = 2000


def main() -> None:
    options = parse_arguments()
    settings = read_settings(options.settings)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    model = make_model(options, settings)
    half_precision, quantized = (options.out / f"{NAME}.{kind}.gguf" for kind in ("F16", "Q8_0"))
    for path in (half_precision, quantized):
        write_gguf(model, path, options.vocab, settings.license, is_quantized=path is quantized)
        print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)
    measure(GreedyModel(quantized, options.threads), options.out, settings.examples_per_task)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Make the bundled tiny model again.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the files that are written")
    parser.add_argument(
        "--vocab", type=Path, default=BUNDLED, help="GGUF file with Llama 2's vocabulary (default: the bundled model)"
    )
    parser.add_argument(
        "--settings",
        type=Path,
        default=PUBLISHED,
        help="TOML file (default: settings.toml, those of the bundled model)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do without a C++ compiler")
    parser.add_argument("--from-checkpoint", action="store_true", help="take OUT/checkpoint.pt; do not train")
    options = parser.parse_args()
    if options.vocab.resolve().parent == options.out.resolve():
        parser.error("--out is the directory of --vocab, which could be overwritten; choose another one")
    return options


def make_model(options: argparse.Namespace, settings: Settings) -> Llama:
    """The trained model, from the checkpoint or from all stages."""
    vocabulary = Vocabulary(options.vocab)
    checkpoint = options.out / "checkpoint.pt"
    torch.manual_seed(settings.seed)
    model = Llama(vocabulary.size, settings.shape)
    if options.from_checkpoint:
        model.load_state_dict(torch.load(checkpoint))
        return model
    check_conversations(vocabulary, settings)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_embedded = model.embed.weight.numel()
    print(f"{n_parameters:,} parameters, {n_parameters - n_embedded:,} without embeddings", flush=True)
    run = torch.compile(model, dynamic=True) if options.compile else model
    for number in range(len(settings.stages)):
        train(model, run, vocabulary, settings, number, checkpoint)
    return model


def check_conversations(vocabulary: Vocabulary, settings: Settings) -> None:
    """Raise ValueError unless prompts and answers may be tokenized apart (see encoding.py)."""
    source = Conversations(vocabulary.pieces, settings.seed, settings.mixes["broad"])
    for _ in range(CHECKED_CONVERSATIONS):
        _, system, turns = source.example()
        check(vocabulary.tokenize, system, turns)


def measure(model: GreedyModel, out: Path, per_task: int) -> None:
    """Write and print the golden answers and the accuracy table."""
    golden = golden_answers(model)
    (out / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for case in golden:
        print(f"{case['messages'][-1]['content']!r} -> {case['greedy']!r}")
    table = accuracy(model, per_task)
    (out / "accuracy.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
