"""The HTML report: what stands in it, what it refuses, and how a browser takes it."""

import json
import re
import shutil
from html.parser import HTMLParser

import pyarrow
import pyarrow.parquet
import pytest
from report_folders import make_result, write

from latent_ae.errors import UserError
from latent_ae.evaluation.report import write_report
from latent_ae.evaluation.report.charts import Series, bar_chart, line_chart
from latent_ae.evaluation.report.numbers import fixed, percent, significant
from latent_ae.evaluation.report.scales import Axis, Scale

HOSTILE = "<script>alert(1)</script>.jpg"
MODELS = {
    "first": {"blur": 2.0, "channels": 4},
    "second": {"blur": 3.2, "channels": 4},
    "third": {"blur": 1.4, "channels": 8},
}


class Page(HTMLParser):
    """What a page loads, the ids it has, its text without markup."""

    def __init__(self, text):
        super().__init__()
        self.resources, self.ids, self.links, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.text = re.sub(r"[ \n\t]+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag != "a"):
                self.resources.append(value)
            if name == "href" and tag in ("a", "use"):
                self.links.append(value)

    def handle_data(self, data):
        if self.lasttag not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    return {
        name: (root / name, make_result(root / name, name, seed=seed, **options))
        for seed, (name, options) in enumerate(MODELS.items())
    }


@pytest.fixture(scope="module")
def three(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "deep" / "three.html"
    return write_report([folder for folder, _ in folders.values()], out)


@pytest.fixture
def changed(folders, tmp_path):
    """Writes the report of the first model after a change to its evaluation.json."""

    def build(change):
        folder = tmp_path / "changed"
        shutil.copytree(folders["first"][0], folder)
        content = json.loads((folder / "evaluation.json").read_text())
        change(content)
        write(folder, content)
        return write_report([folder], tmp_path / "report.html").read_text()

    return build


def test_it_loads_nothing_from_elsewhere(three):
    text = three.read_text()
    page = Page(text)
    assert page.resources
    for resource in page.resources:
        assert resource.startswith(("data:", "#")), resource[:80]
    policies = [attributes.get("content", "") for tag, attributes in page.tags if tag == "meta"]
    assert any(policy.startswith("default-src 'none'; img-src data:;") for policy in policies)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert [path.name for path in three.parent.iterdir()] == ["three.html"]


def test_ids_are_unique_and_links_lead_somewhere(three):
    page = Page(three.read_text())
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link.startswith("#")
        assert link[1:] in page.ids
    for tag, attributes in page.tags:
        if "data-same" in attributes:
            assert attributes["data-same"] in page.ids
        if tag == "img":
            assert attributes["alt"]


def test_a_shared_picture_is_held_once(three, folders):
    uris = re.findall(r'"(data:image/webp;base64,[^"]+)"', three.read_text())
    assert len(uris) == len(set(uris))
    # Six inputs are the same for all three models; so are the 7 interpolations and 6 thumbnails.
    files = {
        path.read_bytes() for folder, _ in folders.values() for path in folder.glob("pictures/*")
    }
    assert len(uris) == len(files)


@pytest.mark.parametrize("names", [["first"], list(MODELS)])
def test_every_number_of_the_tables_stands_in_the_page(folders, tmp_path, names):
    out = write_report([folders[name][0] for name in names], tmp_path / "report.html")
    text = Page(out.read_text()).text
    for name in names:
        content = folders[name][1]
        assert name in text
        for group in (content, *content["references"]):
            for metric, value in group["metrics"].items():
                digits = 2 if metric == "psnr" else 4
                assert fixed(value, digits) in text
                low, high = group["intervals"][metric]
                assert f"{fixed(low, digits)} – {fixed(high, digits)}" in text
        assert significant(content["frechet"]["distance"]) in text
        assert content["frechet"]["note"] in text
        assert fixed(content["model"]["values_per_image"], 0) in text
        assert fixed(content["model"]["bits_per_image"], 0) in text
        for channel in content["latents"]["channels"]:
            assert fixed(channel["mean"], 3) in text
            assert percent(channel["signal_share"], 1) in text
        for value in content["latents"]["aggregate"].values():
            assert significant(value) in text
        for one in content["probes"]["equivariance"]:
            assert one["transform"] in text
            assert fixed(one["latents"], 3) in text
        precision = content["precision"]
        assert significant(precision["largest_activation"]) in text
        assert precision["reason"] in text
        for picture in content["pictures"]["shown"]:
            assert f"PSNR {fixed(picture['metrics']['psnr'], 2)}" in text
    assert content["data"]["pixels_sha256"] in text
    assert "shorter side to 256 by Lanczos" in text


def test_the_best_model_is_told_only_among_several(folders, three, tmp_path):
    def best(path):
        return re.findall(r"<strong>([\d.]+)</strong><span class=\"hidden\"> \(best\)", path)

    third = folders["third"][1]
    assert best(three.read_text()) == [
        fixed(third["metrics"]["psnr"], 2),
        *(fixed(third["metrics"][name], 4) for name in ("ssim", "ms_ssim", "lpips")),
        significant(third["frechet"]["distance"]),
    ]
    alone = write_report([folders["third"][0]], tmp_path / "one.html")
    assert not best(alone.read_text())


def test_equals_are_both_the_best(folders, tmp_path):
    first = folders["first"][0]
    text = write_report([first, first], tmp_path / "twice.html").read_text()
    assert text.count("(best)") == 10
    # Two models of one name and one folder are still told apart.
    assert "first (first) 1" in text
    assert "first (first) 2" in text


def test_differences_are_taken_picture_by_picture(folders, tmp_path):
    first, other = folders["first"][0], tmp_path / "other"
    shutil.copytree(first, other)
    table = pyarrow.parquet.read_table(other / "per_image.parquet")
    columns = {**table.to_pydict()}
    gain = [0.5, 0.5, 0.5, -0.5]
    columns["psnr"] = [value + gain[i % 4] for i, value in enumerate(columns["psnr"])]
    columns["lpips"] = [value - 0.01 for value in columns["lpips"]]
    pyarrow.parquet.write_table(pyarrow.table(columns), other / "per_image.parquet")
    text = Page(write_report([first, other], tmp_path / "report.html").read_text()).text
    assert re.search(r"\+0\.25 \+0\.1\d to \+0\.3\d 75 %", text)
    assert "−0.0100 −0.0100 to −0.0100 100 %" in text
    # Of other pictures there is nothing to subtract.
    columns["key"][0] = "another.jpg"
    pyarrow.parquet.write_table(pyarrow.table(columns), other / "per_image.parquet")
    text = write_report([first, other], tmp_path / "report.html").read_text()
    assert "Differences picture by picture" not in text


def test_hostile_names_are_escaped(changed):
    def spoil(content):
        content["name"] = HOSTILE
        content["data"]["path"] = HOSTILE
        content["data"]["skipped"] = [{"key": HOSTILE, "reason": '"><img src=x onerror=alert(1)>'}]
        content["data"]["not_finite"] = [HOSTILE]
        content["machine"] = HOSTILE
        content["references"][0]["detail"] = HOSTILE
        content["precision"]["layers"][0]["name"] = HOSTILE
        content["precision"]["reason"] = HOSTILE
        content["probes"]["map"]["keys"][0] = HOSTILE
        content["probes"]["equivariance"][0]["transform"] = HOSTILE
        content["metrics"][HOSTILE] = 1.0
        content["frechet"]["note"] = HOSTILE
        for pictures in ("shown", "worst"):
            content["pictures"][pictures][0]["key"] = HOSTILE
        content["pictures"]["prior"][0]["title"] = HOSTILE

    text = changed(spoil)
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<script>alert" not in text
    assert "onerror=alert(1)" in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert HOSTILE in page.text


def test_what_was_not_measured_is_said(changed):
    def empty(content):
        for block in ("frechet", "latents", "probes", "precision"):
            content[block] = None
        content["references"] = []
        content["intervals"] = {}
        content["pictures"] = {}
        content["model"] = {}
        content["metrics"] = {"psnr": None, "lpips_vgg": 0.25, "future": 1.5}

    text = Page(changed(empty)).text
    assert "the latents were not measured" in text
    assert "the latents were not probed" in text
    assert "low precision was not tried" in text
    assert text.count("No pictures were kept") == 2
    assert "0.2500" in text
    assert "future" in text
    assert "None" not in text


def test_nulls_inside_blocks_are_dashes(changed):
    def thin(content):
        def walk(value):
            if isinstance(value, dict):
                return {key: walk(one) for key, one in value.items()}
            if isinstance(value, list):
                return [walk(one) for one in value]
            return None if isinstance(value, float) else value

        for block in ("frechet", "latents", "probes", "precision", "references", "metrics"):
            content[block] = walk(content[block])
        content["latents"]["spectrum"] = None
        content["intervals"]["psnr"] = None

    text = changed(thin)
    assert "None" not in Page(text).text
    assert "nan" not in Page(text).text.lower().split()


def test_numbers_that_json_does_not_know_are_dashes(changed):
    def spoil(content):
        content["metrics"]["psnr"] = float("nan")
        content["latents"]["std"] = float("inf")

    words = Page(changed(spoil)).text.lower().split()
    assert "nan" not in words
    assert "inf" not in words


def test_skipped_and_not_finite_pictures_are_shown(changed):
    def spoil(content):
        content["data"]["skipped"] = [{"key": "cut.jpg", "reason": "image file is truncated"}]
        content["data"]["skipped"] += [{"key": f"{i}.jpg", "reason": ""} for i in range(60)]
        content["data"]["not_finite"] = ["photo-01.jpg"]

    text = changed(spoil)
    page = Page(text)
    assert "61 pictures could not be read" in page.text
    assert "cut.jpg : image file is truncated" in page.text
    assert "and 11 more" in page.text
    assert "for 1 picture: photo-01.jpg" in page.text
    assert 'class="flag">not finite' in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "evaluation.json").unlink(), "has no evaluation.json"),
        (lambda folder: shutil.rmtree(folder), "has no evaluation.json"),
        (lambda folder: (folder / "evaluation.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "evaluation.json").write_text("[]"), "evaluation.json, top"),
        (lambda folder: (folder / "evaluation.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda folder: edit(folder, "format", 2), "evaluation.json, format"),
        (lambda folder: edit(folder, "metrics", {"psnr": "high"}), "evaluation.json, metrics.psnr"),
        (lambda folder: edit(folder, "protocol", {"seed": -1}), "evaluation.json, protocol.seed"),
        (lambda folder: (folder / "per_image.parquet").unlink(), "per_image.parquet is missing"),
        (lambda folder: (folder / "per_image.parquet").write_text("x"), "cannot be read"),
        (lambda folder: words_for_numbers(folder), "psnr: string is no floating-point number"),
        (lambda folder: (folder / "pictures/input-0.webp").unlink(), "input-0.webp is missing"),
        (lambda folder: (folder / "pictures/input-0.webp").write_text("x"), "is no picture"),
    ],
)
def test_a_damaged_folder_is_one_sentence(folders, tmp_path, damage, words):
    folder = tmp_path / "damaged"
    shutil.copytree(folders["first"][0], folder)
    damage(folder)
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        write_report([folder], out)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not out.exists()


def edit(folder, key, value):
    content = json.loads((folder / "evaluation.json").read_text())
    write(folder, {**content, key: value})


def words_for_numbers(folder):
    table = pyarrow.table({"key": ["a"], "psnr": ["high"]})
    pyarrow.parquet.write_table(table, folder / "per_image.parquet")


def test_a_strangers_folder_takes_no_other_file(changed, tmp_path):
    (tmp_path / "secret.webp").write_bytes(b"secret")

    def spoil(content):
        content["pictures"]["shown"][0]["input"] = "../secret.webp"

    with pytest.raises(UserError, match="lies outside"):
        changed(spoil)


def test_the_spread_is_drawn_without_pictures_that_are_not_finite(folders, tmp_path):
    folder = tmp_path / "thin"
    shutil.copytree(folders["first"][0], folder)
    table = {"key": ["a", "b"], "psnr": [20.0, float("nan")], "lpips": [None, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "per_image.parquet")
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert "PSNR of the pictures" in text
    assert "LPIPS of the pictures" not in text


def test_charts_leave_out_what_cannot_be_drawn():
    x, y = Axis("a <b>", log=True), Axis("c", log=True)
    points = [(0.0, 1.0), (1.0, None), (0.1, float("inf")), (-1.0, 2.0)]
    assert line_chart("title", [Series("one", points)], x, y) == ""
    assert bar_chart("title", [("0", None)], x, y) == ""
    chart = line_chart("title", [Series("one", [*points, (1.0, 1.0)])], x, y)
    assert "a &lt;b&gt;" in chart
    assert chart.count("<path") == 1


@pytest.mark.parametrize(
    ("axis", "values", "labels"),
    [
        (Axis(""), [0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Axis("", percent=True, low=0, high=1), [0.5], ["0 %", "20 %", "40 %", "60 %", "80 %"]),
        (Axis("", log=True), [1.0, 1e6], ["1", "10", "100", "1000", "10⁴", "10⁵", "10⁶"]),
        (Axis("", log=True), [0.01, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]),
        (Axis(""), [7.0, 7.0], ["6.6", "6.8", "7.0", "7.2", "7.4"]),
        (Axis(""), [-3000.0, 3000.0], ["−2 000", "0", "2 000"]),
    ],
)
def test_ticks_are_round(axis, values, labels):
    ticks = [text.replace("\u202f", " ") for _, text in Scale(axis, values, 0, 100).ticks()]
    assert [label for label in labels if label not in ticks] == []
    assert len(ticks) <= 8


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.2345, "1.23"),
        (-0.00412, "−0.00412"),
        (65504.0, "65 504"),
        (2.951e6, "2.95 × 10⁶"),
        (3e-7, "3.00 × 10⁻⁷"),
        (float("nan"), "–"),
        (-0.00001234, "−1.23 × 10⁻⁵"),
    ],
)
def test_numbers_are_readable(value, text):
    assert significant(value).replace("\u202f", " ") == text


def test_a_small_negative_is_not_minus_zero():
    assert fixed(-0.0001, 2) == "0.00"
    assert fixed(-0.01, 2) == "−0.01"
