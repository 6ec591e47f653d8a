"""The hub is a small server here that takes what the real one takes: repositories and commits."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import constants

from latent_ae import UserError, evaluate, push_to_hub
from latent_ae.config import PROTOCOLS
from latent_ae.export.card import without_paths
from latent_ae.hub import prepare_upload


@pytest.fixture(scope="module")
def measured(exported, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    protocol = PROTOCOLS["photos256"].model_copy(update={"images": 2, "resolution": 64})
    evaluate(exported, photos, protocol, out=folder, quick=True, references=("Lanczos",))
    return folder


class Hub(BaseHTTPRequestHandler):
    """The calls of `create_repo` and `upload_folder`, every file inside the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append(self.path)
        if self.server.refusal and self.path.endswith(self.server.refusal):
            return self.answer({"error": "no"}, 400)
        if self.path.endswith("/api/repos/create"):
            self.server.created = json.loads(body)
            return self.answer({"url": f"{self.server.address}/me/thing", "id": "1"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {
                    "files": [
                        {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                    ]
                }
            )
        if self.path.endswith("/validate-yaml"):  # of the card's head
            return self.answer({"errors": [], "warnings": []})
        for line in body.decode().splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                content = base64.b64decode(row["value"]["content"])
                self.server.files[row["value"]["path"]] = content
        commit = f"{self.server.address}/me/thing/commit/abc"
        return self.answer({"success": True, "commitUrl": commit, "commitOid": "abc"})

    def do_GET(self):
        self.server.calls.append(self.path)
        return self.answer({"id": "me/thing", "name": "me", "sha": "abc", "siblings": []})

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.calls, server.files, server.refusal = [], {}, None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_arrives_loads_and_its_card_holds_the_numbers(hub, exported, measured, tmp_path):
    address = push_to_hub(
        exported,
        "me/thing",
        evaluation=measured,
        license_name="mit",
        private=True,
        token="hf_x",
        endpoint=hub.address,
    )
    assert address.endswith("/me/thing/commit/abc")
    assert hub.created["name"] == "thing"
    assert not exported.with_name(f"{exported.name}-upload").exists()
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    AutoencoderKL.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    numbers = json.loads((measured / "evaluation.json").read_text())["metrics"]
    (result,) = front["model-index"][0]["results"]
    told = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert told == {name: pytest.approx(value, abs=1e-4) for name, value in numbers.items()}
    assert front["license"] == "mit"
    assert 'from_pretrained("me/thing")' in card
    for picture in ("shown-000-input", "shown-001-reconstruction"):
        assert f"pictures/{picture}.webp" in card
        assert f"pictures/{picture}.webp" in hub.files


def test_a_refusal_or_no_hub_leaves_the_folder_ready(hub, exported, tmp_path):
    ready = exported.with_name(f"{exported.name}-upload")
    hub.refusal = "/api/repos/create"
    with pytest.raises(UserError, match=f"refused it.*later: hf upload me/thing {ready}"):
        push_to_hub(exported, "me/thing", token="hf_x", endpoint=hub.address)
    AutoencoderKL.from_pretrained(ready)
    hub.refusal = None  # the same command again
    push_to_hub(exported, "me/thing", token="hf_x", endpoint=hub.address)
    assert not ready.exists()


def test_offline_the_folder_is_made_all_the_same(exported):
    ready = exported.with_name(f"{exported.name}-upload")
    with pytest.raises(UserError, match=r"the hub cannot be reached.*hf upload me/thing"):
        push_to_hub(exported, "me/thing", token="hf_x")
    assert (ready / "README.md").is_file()
    for file in ready.iterdir():
        file.unlink()
    ready.rmdir()


def test_nothing_tells_where_somebody_works(exported, measured, photos, tmp_path):
    prepare_upload(exported, tmp_path / "ready", "thing", evaluation=measured)
    for file in ("README.md", "latent_ae.json", "config.json"):
        assert str(photos.parent) not in (tmp_path / "ready" / file).read_text()
    record = json.loads((tmp_path / "ready/latent_ae.json").read_text())
    assert record["config"]["data"]["path"] == photos.name


def test_a_folder_that_was_not_trained_here_gets_a_card_of_what_is_known(exported, tmp_path):
    AutoencoderKL.from_pretrained(exported).save_pretrained(tmp_path / "foreign")
    file = tmp_path / "foreign/config.json"
    config = json.loads(file.read_text())
    for key in ("scaling_factor", "force_upcast", "shift_factor"):  # as SD 1.x has it
        del config[key]
    file.write_text(json.dumps(config))
    ready = prepare_upload(tmp_path / "foreign", tmp_path / "ready", "thing", license_name="mit")
    card = (ready / "README.md").read_text()
    assert "Trained with latent_ae" not in card
    assert "| scaling_factor | 0.18215 |" in card
    assert sorted(file.name for file in ready.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_bad_input_is_one_sentence_and_leaves_nothing(exported, measured, tmp_path):
    with pytest.raises(UserError, match="cannot be a repository's name"):
        prepare_upload(exported, tmp_path / "out", "a/b/c")
    with pytest.raises(UserError, match="is no exported autoencoder"):
        prepare_upload(tmp_path, tmp_path / "out", "thing")
    with pytest.raises(UserError, match="no identifier of the hub's"):
        prepare_upload(exported, tmp_path / "out", "thing", license_name="not a: [licence")
    network = AutoencoderKL.from_pretrained(exported)
    network.decoder.conv_out.bias.data += 1
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="of other weights"):
        prepare_upload(tmp_path / "other", tmp_path / "out", "thing", evaluation=measured)
    (tmp_path / "other/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        prepare_upload(tmp_path / "other", tmp_path / "out", "thing")
    (tmp_path / "other/config.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        prepare_upload(tmp_path / "other", tmp_path / "out", "thing")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_bare_name_gets_its_owner_in_the_card(hub, exported):
    push_to_hub(exported, "thing", token="hf_x", endpoint=hub.address)
    assert b'from_pretrained("me/thing")' in hub.files["README.md"]


def test_paths_lose_all_but_their_last_part():
    record = {
        "config": {
            "data": {"path": "/home/John Smith/photos", "source": "imagefolder"},
            "network": {"path": "C:\\Users\\me\\ae"},
            "output": "../me/run/",
        },
        "metric_protocol": "the first 4 pictures of /home/John Smith/photos, shorter side to 64",
    }
    found = without_paths(record)
    assert found["config"]["data"]["path"] == "photos"
    assert found["config"]["network"]["path"] == "ae"
    assert found["config"]["output"] == "run"
    assert found["metric_protocol"] == "the first 4 pictures of photos, shorter side to 64"
    hub = {"config": {"data": {"path": "me/pictures", "source": "hub"}}}
    assert without_paths(hub)["config"]["data"]["path"] == "me/pictures"
