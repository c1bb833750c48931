"""Write the tables of docs/results.md from run folders.

    python benchmarks/results.py docs/results.md NAME=RUN_DIR [NAME=RUN_DIR ...]

replaces what stands between the two marker lines. Every figure comes out of ``metrics.jsonl``, ``config.json`` and
``result.json`` of the runs.
"""

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- runs: begin -->", "<!-- runs: end -->"


def read(run: Path) -> tuple[list[dict], dict, dict]:
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return epochs, json.loads((run / "config.json").read_text()), json.loads((run / "result.json").read_text())


def percent(evaluation: dict) -> str:
    return f"{100 * evaluation['correct'] / evaluation['count']:.2f} %"


def tables(runs: dict[str, Path]) -> str:
    content = {name: read(path) for name, path in runs.items()}
    lines = [
        "| | FP32 test | W2A2 test | epoch | mean s an epoch | model.pt | model.onnx |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (epochs, _, result) in content.items():
        seconds = sum(epoch["seconds"] for epoch in epochs) / len(epochs)
        sizes = [f"{result['bytes'].get(file, 0) / 1e6:.2f} MB" for file in ("model.pt", "model.onnx")]
        row = [
            name,
            percent(result["test_float"]),
            percent(result["test"]),
            str(result["epoch"]),
            f"{seconds:.0f}",
        ]
        lines.append("| " + " | ".join([*row, *sizes]) + " |")
    lines += [
        "",
        "Accuracy on training (augmented) / validation images, BR_W and BR_A (means over the epoch), seconds:",
        "",
    ]
    lines += ["| epoch | " + " | ".join(content) + " |", "|---|" + "---|" * len(content)]
    for number in range(max(len(epochs) for epochs, _, _ in content.values())):
        cells = []
        for epochs, _, _ in content.values():
            epoch = epochs[number]
            extra = "".join(f", {term:.3f}" for term in epoch["train"]["terms"].values())
            accuracy = f"{epoch['train']['accuracy']:.2%} / {epoch['val_accuracy']:.2%}"
            cells.append(f"{accuracy}{extra}, {epoch['seconds']:.0f} s")
        lines.append(f"| {number + 1} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, (_, config, _) in content.items():
        train = config["train"]
        lines.append(
            f"- {name}: seed {train['seed']}, "
            f"batch {config['batch_size']}, rate {train['lr']:g} (steps {train['step_lr']:g}), "
            f"decay {train['weight_decay']:g}, warm-up {train['warmup_epochs']} of {train['epochs']} epochs, "
            f"lambda {config['lambda_br']:g} / {config['lambda_br_act']:g}; torch {config['versions']['torch']}"
        )
    return "\n".join(lines)


def main() -> None:
    page, runs = Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:])
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    body = tables({name: Path(path) for name, path in runs.items()})
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")


if __name__ == "__main__":
    main()
