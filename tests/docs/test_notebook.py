"""examples/finetune.ipynb, run from its first cell to its last."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "finetune.ipynb"


def is_json(answer: str) -> bool:
    """Tell if an answer has the format of the notebook's rows."""
    try:
        return json.loads(answer).keys() == {"subject", "answer"}
    except ValueError:
        return False


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_and_the_model_learns_its_format(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 17))
    assert metrics[-1]["loss"] < 0.5 < 4 < metrics[0]["loss"]
    answers = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert len(answers) == 3
    assert not any(is_json(answer["before"]) for answer in answers)
    assert sum(is_json(answer["after"]) for answer in answers) >= 2
    # The adapter, read back by the last cell.
    (again,) = json.loads((tmp_path / "answers" / "answers.json").read_text())
    assert is_json(again["after"])
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "before: " + answers[0]["before"].splitlines()[0] in "".join(output.get("text", "") for output in outputs)
