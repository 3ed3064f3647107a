"""Say how far the quickstart has come below chance, from the metrics of its run.

python examples/summarize.py RUN_FOLDER
"""

import math
import sys
from pathlib import Path

from megatron.training.metrics import METRICS_FILE, read_metrics


def main() -> None:
    records = read_metrics(Path(sys.argv[1]) / METRICS_FILE)
    config = next(r["config"] for r in records if r["event"] == "start")
    last = [r for r in records if r["event"] == "eval"][-1]
    chance = math.log(config["model"]["vocab_size"])
    print(f"validation loss      {last['loss']:.3f} nats a token")
    print(f"chance, ln(vocab)    {chance:.3f} nats")
    print(f"below chance by      {chance - last['loss']:.3f} nats")
    print(f"bits per byte        {last['bits_per_byte']:.3f}")


if __name__ == "__main__":
    main()
