"""The command line: steps in page order, options from signatures, one sentence and status 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simclr import BadInput
from simclr.__main__ import BLOCKS, OPENERS, STEPS, _parser, find, main, read_block
from simclr.benchmarks import BENCHMARKS, imagenet_knn
from simclr.config import Config

ROOT = Path(__file__).parent.parent


def said(capsys: pytest.CaptureFixture, *arguments: str, status: int = 2) -> str:
    """Run the command line, check its exit status, return what it says on standard error."""
    assert main(list(arguments)) == status
    return capsys.readouterr().err


def test_help_lists_every_step_in_page_order_without_anything_heavy():
    code = (
        "import sys, simclr.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    places = [done.stdout.index(f"  {step} ") for step in STEPS]
    assert places == sorted(places)
    assert [step for step in STEPS if step in BENCHMARKS] == list(BENCHMARKS)


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_help_and_opens_what_its_signature_says(step, capsys):
    function = find(STEPS[step][0])
    with pytest.raises(SystemExit) as end:
        main([step, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name, annotation in function.__annotations__.items():
        if name == "return":
            continue
        assert f"--{name.replace('_', '-')}" in shown
        if name in BLOCKS:
            assert find(f"{function.__module__}:{annotation}")
        else:
            assert annotation.split(" |")[0] in OPENERS, f"{step} --{name}: {annotation}"


def test_an_unknown_step_or_option_ends_with_status_2(capsys):
    for arguments in (["imagenet_kn"], [], ["imagenet_knn", "--trian", "x"], ["random_init"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


def test_a_json_file_is_read_as_json(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text('{"architecture": "resnet18",}')
    with pytest.raises(BadInput, match=r"--config: .*recipe.json is not valid JSON"):
        read_block(str(file), Config)


def test_bad_input_is_one_sentence(tmp_path, capsys):
    output = str(tmp_path / "x.safetensors")
    message = said(capsys, "random_init", "--config", '{"sede": 1}', "--output", output)
    assert message.startswith("simclr: --config: sede: unknown key; did you mean seed?")
    assert message.count("\n") == 1


def test_the_schema_step_runs_from_the_command_line(tmp_path, capsys):
    (tmp_path / "README.md").write_text((ROOT / "config/README.md").read_text())
    arguments = ["--output", str(tmp_path / "s.yaml"), "--readme", str(tmp_path / "README.md")]
    assert said(capsys, "schema", *arguments, status=0) == ""
    assert (tmp_path / "s.yaml").exists()


def test_a_block_is_json_or_a_file_or_a_block_of_a_file():
    published = imagenet_knn.Config()
    assert read_block("{}", imagenet_knn.Config) == published
    assert read_block(f"{ROOT}/config/config.yaml:benchmarks.imagenet_knn", imagenet_knn.Config) == published
    assert read_block(f"{ROOT}/config/config.yaml", Config).runs("random_init") == list(BENCHMARKS)
    text = json.dumps({"version": 3})
    assert read_block(text, imagenet_knn.Config).version == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON"),
        ("nowhere.yaml:a", "there is no file 'nowhere.yaml'"),
        (f"{ROOT}/config/config.yaml:benchmarks.imagenet_kn", r"no block benchmarks.imagenet_kn"),
        ('{"version": 0}', "--config: version: input should be greater than or equal to 1; found 0"),
    ],
)
def test_a_block_that_cannot_be_read_says_why(text, message):
    with pytest.raises(BadInput, match=message):
        read_block(text, imagenet_knn.Config)


@pytest.mark.parametrize("step", STEPS)
def test_torchrun_hands_every_option_of_a_step_on(step):
    """It takes for its own what begins one of its own options, wherever it stands: --run, for --run-path."""
    from torch.distributed.run import parse_args

    options = [action.option_strings[-1] for action in _parser(step, find(STEPS[step][0]))._actions]
    arguments = [text for option in options for text in (option, "value")]
    parsed = parse_args(["--standalone", "--nproc-per-node=2", "-m", "simclr", step, *arguments])
    assert parsed.training_script_args == [step, *arguments]
