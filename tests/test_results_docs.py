"""The commands of docs/results.md, run as they are written."""

import json
import re
import shutil
from pathlib import Path

import html_checks
import prediction_samples
from shell_commands import run_in_process

from vit22b_transfer.demo import scenes

PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def write_run(folder, said):
    """A run's predictions of the validation images, as an evaluation leaves them.

    said: which of an image's captions is predicted of every second one.
    """
    content = json.loads((folder.parent / "validation.json").read_text())
    captions = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        captions[entry["image_id"]].append(entry["caption"])
    lines = [
        {
            "image_id": str(number),
            "prompt": "caption en",
            "prediction": texts[said] if number % 2 else texts[0],
            "target": texts[0],
            "references": texts,
        }
        for number, texts in captions.items()
    ]
    folder.mkdir()
    path = folder / "predictions.jsonl"
    prediction_samples.write(path, lines, "my_captions", "validation")
    entry = {"my_captions/validation": {"predictions": path.name, "metrics": {}}}
    (folder / "metrics.json").write_text(json.dumps(entry))


def test_results_run_as_written(tmp_path, capsys):
    sizes = {"train": 2, "validation": 8, "test": 2}
    drawn = scenes.write_scenes(tmp_path / "drawn", seed=3, sizes=sizes)
    shutil.copy(drawn["validation"].captions, tmp_path / "validation.json")
    for name, said in (("run_a", 0), ("run_b", -1)):
        write_run(tmp_path / name, said)
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    run_in_process(
        commands,
        tmp_path,
        MY_CAPTIONS_JSON="validation.json",
        MY_VALIDATION_JSON="validation.json",
        MY_IMAGES=str(drawn["validation"].images),
        VIT22B_VOCABULARY="bytes",
    )
    shown = capsys.readouterr().out
    assert "captions_results.json: 8 entries" in shown
    assert "comparing my_captions/validation" in shown
    assert "cut at 32" in shown
    assert len(json.loads((tmp_path / "scores.json").read_text())["slices"]) == 1
    for page in ("compare.html", "run_a/report.html", "data.html"):
        _, tags = html_checks.checked((tmp_path / page).read_text())
        assert tags.count("img") >= 2, page
