import json
import resource
import subprocess
import sys

import pytest
import yaml

from latent_ae import cli
from latent_ae.config_file import dump_yaml

VERBS = ("train", "export", "onnx", "evaluate", "compare", "encode", "latents", "config")


def run(capsys, monkeypatch, *arguments):
    """The command line in this process: exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["latent-ae", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_and_how(capsys, monkeypatch, verb):
    code, out, _ = run(capsys, monkeypatch, verb, "--help")
    assert code == 0
    assert len(out.splitlines()) > 10


def test_help_is_quick_and_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['latent-ae', '--help']\n"
        "import latent_ae, latent_ae.cli\n"
        "try: latent_ae.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'datasets', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    # The processor's time: other work on the machine makes the clock's longer.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_whole_way_from_the_command_line(capsys, monkeypatch, tiny, photos, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(tiny()))

    def go(*arguments):
        code, out, err = run(capsys, monkeypatch, *arguments)
        assert code == 0, err
        return out, err

    go("train", config, "training.steps=2", f"output={tmp_path / 'run'}")
    _, err = go("export", tmp_path / "run", tmp_path / "ae", "--images", 4, "--statistics", "shift")
    assert "note: shift_factor: StableDiffusionPipeline" in err.replace("\n", " ")
    folder = tmp_path / "measured"
    measure = [
        "resolution=64",
        "--name",
        "measured",
        "--out",
        folder,
        "--json",
        tmp_path / "m.json",
    ]
    out, err = go("evaluate", tmp_path / "ae", photos, *measure)
    assert "Lanczos" in out
    assert "force_upcast" in out
    assert "photos256, changed" in err
    assert json.loads((tmp_path / "m.json").read_text())["metrics"]["psnr"] > 0
    assert (folder / "report.html").is_file()
    both = ["--data", photos, "resolution=64", "--out", tmp_path / "both", "--quick"]
    out, _ = go("compare", folder, tmp_path / "ae", *both)
    assert "measured" in out
    assert "ae" in out
    assert (tmp_path / "both/report.html").is_file()
    assert (tmp_path / "both/ae/evaluation.json").is_file()
    go("encode", tmp_path / "ae", photos, tmp_path / "latents", "--resolution", 64)
    out, _ = go("latents", "info", tmp_path / "latents")
    assert "AutoencoderKL" in out
    _, err = go("latents", "verify", tmp_path / "latents")
    assert "is sound" in err
    go("latents", "split", tmp_path / "latents", tmp_path, "--share=a=0.5", "--share=b=0.5")
    go("latents", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "joined")
    go("latents", "decode", tmp_path / "joined", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "coffee.png.png").is_file()


def test_config_prints_what_reads_back_and_what_it_means(capsys, monkeypatch, tiny, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(tiny()))
    code, out, _ = run(capsys, monkeypatch, "config", config, "data.batch_size=3")
    assert code == 0
    resolved = yaml.safe_load(out)
    assert resolved["data"]["batch_size"] == 3
    for words in (
        "parameters",
        "4 × 16 × 16 (f2, 4 channels)",
        "effective batch",
        "3 image values",
    ):
        assert words in out
    code, out, _ = run(capsys, monkeypatch, "config", "--schema")
    assert code == 0
    assert "properties" in json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "none.yaml"], "there is no config file none.yaml"),
        (["evaluate", "none", "none"], "there is no folder, parquet or tar file at none"),
        (["export", "none", "out"], "none is no training run"),
        (["evaluate", "none", ".", "resolutoin=1"], "did you mean 'resolution'"),
        (["compare", "none"], "there is no folder none to compare"),
        (["compare", "."], "give --data"),
        (["compare", ".", "resolution=64"], "a protocol is for measuring"),
        (["compare", "resolution=64"], "name at least one result folder"),
        (["encode", "none", ".", "out"], "none is no exported autoencoder"),
        (["latents", "decode", "none", "out"], "none is no finished latents folder"),
        (["latents", "info", "none"], "none is no finished latents folder"),
        (["latents", "split", "none", "out", "--share", "a"], "is not NAME=NUMBER"),
        (["encode", ".", ".", "out", "--resize", "9"], "resize 9 is below resolution 256"),
        (["onnx", "none", "out"], "none is no exported autoencoder"),
        (["config"], "give a YAML file"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert not out
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.iterdir())


def test_an_unwritable_json_is_told_before_the_work(
    capsys, monkeypatch, exported, photos, tmp_path
):
    code, _, err = run(capsys, monkeypatch, "evaluate", exported, photos, "--json", tmp_path)
    assert code == 2
    assert err.strip() == f"error: {tmp_path} cannot be written"


def test_the_system_s_refusals_are_one_sentence(capsys, monkeypatch, tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(tiny(output=str(tmp_path / "file/run"))))
    code, _, err = run(capsys, monkeypatch, "train", config)
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_python_m_latent_ae():
    result = subprocess.run(
        [sys.executable, "-m", "latent_ae", "config", "nothing.yaml"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
