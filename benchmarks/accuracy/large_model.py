"""Train a MoE of a few hundred million parameters, quantize it in every way and score that, in one call.

    python -m benchmarks.accuracy.large_model --data DATA -o OUT --model /tmp/large-model

Small models alone mislead: their ranks cost many bits and their experts are thin. On an H100 the preset ``large``
takes under 10 minutes: `--train-seconds` for training, the rest until `--max-seconds` for contenders, the important
ones first. OUT/results.json is whole after every row. A model folder that exists already is not trained again.
DATA is as for benchmarks.train_model; ``--preset smoke`` checks the whole on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.accuracy.perplexity import finish
from benchmarks.accuracy.run import Benchmark, Settings
from benchmarks.train_model import CONTEXT, PRESETS, Limits, load_data, train_and_save

CALIBRATION_WINDOWS = 128


def main() -> int:
    """Train, measure, report; return 1 where a contender could not be measured."""
    start = time.monotonic()
    arguments = _parser().parse_args()
    folder = arguments.model or arguments.output / "model"
    if not (folder / "config.json").exists():
        limits = Limits(None, arguments.train_seconds)
        train_and_save(arguments.preset, arguments.data, folder, limits, arguments.device)
        gc.collect()
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    tokenizer, train, valid = load_data(arguments.data, PRESETS[arguments.preset].vocabulary)
    arguments.output.mkdir(parents=True, exist_ok=True)
    calibration = train[: CALIBRATION_WINDOWS * CONTEXT]
    text = arguments.output / "calibration.txt"
    text.write_text(tokenizer.decode(calibration, skip_special_tokens=True), encoding="utf-8")
    settings = Settings(
        window=CONTEXT,
        windows=arguments.windows,
        calibration_windows=CALIBRATION_WINDOWS,
        rounds=arguments.rounds,
        device=arguments.device,
        quantize_device=arguments.quantize_device or arguments.device,
        jobs=arguments.jobs,
        deadline=start + arguments.max_seconds,
    )
    bench = Benchmark(
        folder=folder,
        tokens=valid,
        calibration_tokens=calibration,
        calibration_text=text,
        output=arguments.output,
        settings=settings,
        record={"model": f"large-model-{arguments.preset}", "text": "valid.bin", "training": training},
    )
    bench.run(["large"], arguments.only)
    return finish(bench, start)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["large", "smoke"], default="large")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", type=Path, help="folder of the model (default: OUTPUT/model); about 1 GB")
    parser.add_argument("--train-seconds", type=float, default=250)
    parser.add_argument("--max-seconds", type=float, default=555, help="give up contenders after this time")
    parser.add_argument("--windows", type=int, default=256, help="of a seed")
    parser.add_argument("--rounds", type=int, default=10, help="cap for the paper's method")
    parser.add_argument("--jobs", type=int, default=2, help="processes of `milo quantize`")
    parser.add_argument("--only", default="", help="only contenders whose names match this pattern (and HQQ)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quantize-device", help="where `milo quantize` runs (default: --device)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
