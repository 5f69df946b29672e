"""A card says what the run's files say, is valid for huggingface_hub, and gives nothing away."""

import ast
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoModel
from transformers.pipelines import get_supported_tasks

import hf_matryoshka_sae
from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig, TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.hub.card import TEMPLATE, card_assets, run_card, sae_card, snippets
from hf_matryoshka_sae.hub.card_text import code, hub_id, table
from hf_matryoshka_sae.hub.layout import find_saes
from hf_matryoshka_sae.training import RunConfig
from hf_matryoshka_sae.training.config.spec import SAESpec


REPO = "someone/tiny-sae"
NESTED = "nested/model.layers.0"


@pytest.fixture(scope="module")
def card(measured_run):
    return str(run_card(measured_run, REPO))


def body(text):
    return text.split("\n---\n", 1)[1]


def rows_of(text, first):
    """The tables whose first column has this title, as lists of dicts."""
    found, titles = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] == first:
            titles = cells
            found.append([])
        elif cells and titles and not cells[0].startswith("---"):
            found[-1].append(dict(zip(titles, cells, strict=True)))
        elif not cells:
            titles = None
    return found


def edit(path, change):
    fields = yaml.safe_load(path.read_text())
    change(fields)
    path.write_text(yaml.safe_dump(fields) if path.suffix == ".yaml" else json.dumps(fields))


# What it says


def test_metadata_is_valid_and_survives_a_round_trip(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    loaded = ModelCard.load(tmp_path / "README.md")
    data = loaded.data
    assert (data.library_name, data.license) == ("transformers", "apache-2.0")
    assert data.tags == ["hf_matryoshka_sae", "sparse-autoencoder", "matryoshka", "mechanistic-interpretability"]
    assert data.base_model is None and data.datasets is None  # embedded: neither is on the Hub
    assert data.model_name == "tiny-sae"
    name, results = model_index_to_eval_results(yaml.safe_load(card.split("---")[1])["model-index"])
    assert name == "tiny-sae" and results == data.eval_results
    assert {result.dataset_config for result in results} == {"model.layers.0", "model.layers.2:input"}
    assert all(isinstance(result.metric_value, float) for result in results)
    assert len({(result.dataset_config, result.metric_name) for result in results}) == len(results)


def test_no_pipeline_is_promised_for_what_has_no_tokenizer(card):
    assert ModelCard(card).data.pipeline_tag is None
    tasks = {result["task"]["type"] for result in yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]}
    assert not tasks & set(get_supported_tasks())
    root = Path(__file__).resolve().parents[2]
    pages = [*root.glob("model_cards/*/README.md"), Path(embedded_sae_path()) / "README.md"]
    assert len(pages) == 3 and all(ModelCard.load(page).data.pipeline_tag is None for page in pages)


def test_every_number_in_the_tables_is_that_of_the_files(card, measured_run):
    results = json.loads((measured_run / "evaluation.json").read_text())["results"]
    expected = [(each, name) for each in results for name in ("nested", "plain") if name in each["saes"]]
    metric_tables = [found for found in rows_of(card, "Width") if "L0" in found[0]]
    baseline_tables = [found for found in rows_of(card, "Width") if "FVU, random" in found[0]]
    shown = {"L0": ("l0", ".2f"), "FVU": ("fvu", ".4f"), "Loss": ("ce", ".4f"), "KL": ("kl", ".4f")}
    shown |= {"Recaptured": ("recaptured_zero", ".4f"), "(mean)": ("recaptured_mean", ".4f"), "Dead": ("dead", ".2%")}
    assert len(metric_tables) == len(baseline_tables) == len(expected) == 3
    for (result, name), lines, beside in zip(expected, metric_tables, baseline_tables, strict=True):
        for row, line, other in zip(result["saes"][name], lines, beside, strict=True):
            assert line["Width"] == str(row["width"])
            assert all(line[title] == format(row[key], form) for title, (key, form) in shown.items())
            assert line["RSA"] == format(row["rsa"]["spearman"], ".4f")
            (random,) = [each for each in result["saes"][f"random ({name})"] if each["width"] == row["width"]]
            assert other["FVU, random"] == format(random["fvu"], ".4f")
            assert other["Recaptured, random"] == format(random["recaptured_zero"], ".4f")
            pca = [e for e in result["saes"]["principal components"] if e["width"] == row["width"]]
            assert other["FVU, PCA"] == (format(pca[0]["fvu"], ".4f") if pca else "–")


def test_the_index_has_the_same_results(card, measured_run):
    results = json.loads((measured_run / "evaluation.json").read_text())["results"]
    index = {(each.dataset_config, each.metric_name): each.metric_value for each in ModelCard(card).data.eval_results}
    for result in results:
        for row in result["saes"]["nested"]:
            value = index[result["hookpoint"], f"FVU (nested, width {row['width']})"]
            assert value == pytest.approx(row["fvu"], abs=1e-6)


def test_it_says_how_the_run_was_made(card, measured_run):
    made = json.loads((measured_run / "provenance.json").read_text())
    sae = made["saes"][NESTED]
    (table,) = [found for found in rows_of(card, "SAE") if "Threshold" in found[0]]
    line = next(each for each in table if NESTED in each["SAE"])
    assert line["Threshold"] == format(sae["calibration"]["threshold"], ".4g")
    assert (line["Solved for L0"], line["On tokens"]) == ("4", "1,024")
    assert (line["Scale"], line["Norm of the mean"]) == (format(sae["scale"], ".4g"), format(sae["mean_norm"], ".4g"))
    assert f"torch {version('torch')}" in card
    assert f"hf_matryoshka_sae {hf_matryoshka_sae.__version__}" in card
    assert "1,280 hidden states in 10 steps of 128" in card
    assert made["language_model"]["class"] in card


def test_its_yaml_is_the_run(card, measured_run):
    (text,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    shown, full = yaml.safe_load(text), yaml.safe_load((measured_run / "run.yaml").read_text())
    assert len(text.splitlines()) < 25
    assert not Path(shown["output_dir"]).is_absolute()
    again = RunConfig.from_dict({**shown, "output_dir": full["output_dir"]}).to_dict()
    assert again == full


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "matryoshka", "num_latents": 64, "k": 4, "sort_every": 0, "grad_clip": None},
        {"type": "matryoshka", "num_latents": 64, "level_weights": "sum"},
        {"type": "matryoshka", "num_latents": 64, "activation": "topk", "level_weights_end": "mean"},
        {"type": "matryoshka", "preset": "saebench", "num_latents": 64},
        {"type": "matryoshka", "grow_from": "runs/base", "num_latents": 64},
        {"type": "relu", "num_latents": 64, "target_l0": None},
        {"type": "jumprelu", "init_from": "runs/base"},
    ],
)
def test_entries_of_saes_are_shown_without_defaults_and_mean_the_same(spec):
    from hf_matryoshka_sae.hub.card_text import _spec

    full = vars(SAESpec.from_dict(spec, ""))
    shown = _spec(full)
    assert len(shown) < 8
    assert vars(SAESpec.from_dict(shown, "")) == {**full, **{k: v for k, v in shown.items() if k == "grow_from"}}


def test_pictures_are_where_the_card_looks_for_them(card, measured_run):
    assets = card_assets(measured_run)
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", card)) == set(assets)
    assert {"plots/evaluation.png", f"plots/{NESTED}/progressive_curve.png", f"plots/{NESTED}/power_law.png"} <= set(
        assets
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in assets.values())


def test_only_papers_that_apply_are_cited(card, measured_run):
    for paper in ("2503.17547", "nabeshima2024", "2412.06410", "2406.04093", "2505.00190"):
        assert card.count(paper) >= 1
    assert "2407.14435" not in card and "2404.16014" not in card
    plain = str(run_card(measured_run, REPO, find_saes(measured_run, ["plain"])))
    assert "2503.17547" not in plain and "- matryoshka\n" not in plain


# What it does not say


def assert_clean(text, *places):
    assert not re.search(r"\b(None|nan|inf|NaN)\b", body(text).replace("harvest(model, tokens.input_ids, None,", ""))
    assert "{{" not in text and "{%" not in text and "Undefined" not in text
    assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|usr|Users|var)\b", text)
    assert not any(str(place) in text for place in places)


def test_nothing_is_empty_or_of_this_machine(card, measured_run):
    assert_clean(card, measured_run)


def test_local_models_and_data_are_shown_without_their_names(run_copy, tmp_path):
    def move(fields):
        fields["model"], fields["model_revision"] = "../private/place/lm", None
        fields["dataset"] = {"path": "/srv/secret place/train.parquet"}
        fields["eval_dataset"] = {"path": str(tmp_path)}
        fields["saes"][0]["init_from"] = "/srv/runs/first"

    edit(run_copy / "run.yaml", move)
    (run_copy / "provenance.json").unlink()
    text = str(run_card(run_copy, REPO))
    assert_clean(text, tmp_path)
    assert "private" not in text and "secret place" not in text and "/srv" not in text
    assert "a language model that is not on the Hub" in text and "train.parquet" not in text
    assert "load_language_model" not in text and "torch.randn(4, 10, 128)  # random" in text
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None
    assert (
        yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])["model"] == "a local language model"
    )


def test_signs_that_mean_something_in_markdown_or_jinja_are_only_text(run_copy):
    def rename(fields):
        fields["dataset"] = {"path": "embedded", "column": "te|xt `{{ x }}`"}
        fields["eval_dataset"] = {"path": "data.txt", "column": "a|{{ 7 * 7 }}"}

    edit(run_copy / "run.yaml", rename)
    text = str(run_card(run_copy, "someone/{{ 7 * 7 }}"))
    assert "# 49" not in text
    assert "`a\\|{{ 7 * 7 }}`" in text
    assert table(["a", "b"], [[code("x|y`z`\n"), "1"]]).endswith("| `x\\|y'z' ` | 1 |")


# Runs of every kind


def test_hub_models_and_data_sets_are_linked_and_loaded(run_copy):
    def publish(fields):
        fields |= {"model": "org/llm", "model_revision": "v1", "dataset": {"path": "org/text", "name": "en"}}

    edit(run_copy / "run.yaml", publish)
    text = str(run_card(run_copy, REPO, license="mit"))
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license) == ("org/llm", ["org/text"], "mit")
    assert "[org/llm](https://huggingface.co/org/llm)" in text
    assert "[org/text](https://huggingface.co/datasets/org/text), configuration `en`" in text
    assert "1.0% of the same documents, left out of training" in text
    with_package, alone = snippets(text)
    assert 'load_language_model("org/llm", revision="v1")' in with_package
    assert 'AutoModelForCausalLM.from_pretrained("org/llm", revision="v1")' in alone
    assert 'model.get_submodule("model.layers.0").register_forward_hook(keep)' in alone
    inputs = snippets(str(run_card(run_copy, REPO, find_saes(run_copy, ["*:input", "*-input"]))))[1]
    assert 'get_submodule("model.layers.2").register_forward_pre_hook(keep, with_kwargs=True)' in inputs
    for each in (with_package, alone, inputs):
        ast.parse(each)


@pytest.mark.parametrize(("kind", "loader"), [("BertForMaskedLM", "AutoModelForMaskedLM"), ("BertModel", "AutoModel")])
def test_the_loader_is_the_one_under_which_the_hookpoint_has_its_name(run_copy, kind, loader):
    edit(run_copy / "run.yaml", lambda fields: fields.update(model="org/encoder"))
    edit(run_copy / "provenance.json", lambda fields: fields["language_model"].update({"class": kind}))
    assert f'model = {loader}.from_pretrained("org/encoder")' in snippets(str(run_card(run_copy, REPO)))[1]


def test_a_run_that_wrote_nothing_down_gets_a_card_without_those_lines(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    (folder / "provenance.json").unlink()
    text = str(run_card(folder, REPO))
    assert_clean(text, folder)
    for absent in ("**Compute**", "**Versions**", "Norm of the mean", "On tokens", "random*:"):
        assert absent not in text
    assert "Threshold" in text and "![Held-out" in text and set(card_assets(folder)) == {"plots/results.png"}
    assert len([found for found in rows_of(text, "Width") if "L0" in found[0]]) == 3


def test_seconds_count_only_where_every_session_is_on_record(run_copy):
    def sessions(*starts):
        def change(fields):
            (one,) = fields["sessions"][:1]
            fields["sessions"] = [{**one, "from_step": start, "seconds": 100.0} for start in starts]

        edit(run_copy / "provenance.json", change)
        return str(run_card(run_copy, REPO))

    assert "**Compute**: 3.3 minutes over 2 sessions" in sessions(0, 5)
    later = sessions(5)
    assert "minutes" not in later and "**Versions**" in later


def test_results_of_other_weights_are_left_out(run_copy):
    sae = AutoModel.from_pretrained(run_copy / NESTED)
    with torch.no_grad():
        sae.b_dec.add_(1.0)
    sae.save_pretrained(run_copy / NESTED)
    saes = find_saes(run_copy, [NESTED])
    text = str(run_card(run_copy, REPO, saes))
    assert "## Results" not in text and "## Power laws" not in text and "model-index" not in text
    assert card_assets(run_copy, saes) == {}
    assert "Nothing about its quality has been measured" in text


def test_damaged_files_are_left_out(run_copy):
    for name in ("evaluation.json", "results.json", "provenance.json", f"{NESTED}/measured.json"):
        (run_copy / name).write_text('{"results": [{')
    text = str(run_card(run_copy, REPO))
    assert_clean(text, run_copy)
    assert "## Results" not in text


def test_a_plain_sae_is_not_promised_to_be_nested(measured_run):
    text = str(run_card(measured_run, REPO, find_saes(measured_run, ["plain"])))
    assert_clean(text, measured_run)
    assert "every_prefix" not in text and "width=" not in snippets(text)[0]
    assert "not trained to be cut" in text
    assert 'subfolder="model.layers.0"' in snippets(text)[0]


# One SAE


def test_an_sae_from_memory_says_what_its_config_knows():
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=8, num_latents=32, k=2, base_model="org/llm", hookpoint="h.3"))
    text = str(sae_card(sae, REPO))
    assert_clean(text)
    assert ModelCard(text).data.base_model == "org/llm"
    assert "`h.3`" in text and "Nothing about its quality has been measured" in text
    assert "How it was made" not in text or "Threshold" in text
    assert "subfolder" not in text and "width=" in snippets(text)[0]


def test_an_sae_of_sentence_embeddings_is_shown_with_texts():
    fields = {"base_model": "org/encoder", "hookpoint": "sentence_embedding"}
    card = str(sae_card(TopKSAE(TopKSAEConfig(d_in=8, num_latents=32, k=2, **fields)), REPO))
    assert "for the embeddings of whole texts" in card and "takes raw embeddings" in card
    ours, alone = snippets(card)
    assert 'model = load_sentence_transformer("org/encoder")' in ours and "harvest" not in ours
    assert 'model = SentenceTransformer("org/encoder")' in alone and "register_forward_hook" not in alone
    for each in (ours, alone):
        ast.parse(each)


def test_an_sae_without_model_and_hookpoint_has_a_card_too():
    text = str(sae_card(TopKSAE(TopKSAEConfig(d_in=8, num_latents=32, k=2)), REPO))
    assert_clean(text)
    assert ModelCard(text).data.base_model is None
    for each in snippets(text):
        assert "torch.randn(4, 10, 8)" in each
        ast.parse(each)


def test_an_sae_of_a_run_has_the_run_s_numbers_and_no_pictures(measured_run):
    folder = measured_run / NESTED
    text = str(sae_card(AutoModel.from_pretrained(folder), REPO, folder))
    assert_clean(text, measured_run)
    (found,) = [found for found in rows_of(text, "Width") if "L0" in found[0]]
    assert [row["Width"] for row in found] == ["32", "160"]
    assert "![" not in text and "subfolder" not in text and "**Compute**" in text


def test_an_sae_that_is_no_longer_the_one_in_the_folder_does_not_borrow_its_numbers(measured_run):
    folder = measured_run / NESTED
    sae = AutoModel.from_pretrained(folder)
    for other in (sae.truncate(32), AutoModel.from_pretrained(measured_run / "nested/model.layers.2-input")):
        assert "## Results" not in str(sae_card(other, REPO, folder))


# Small parts


@pytest.mark.parametrize(
    ("name", "here", "expected"),
    [
        ("org/model", None, "org/model"),
        ("gpt2", None, "gpt2"),
        ("org/model", True, None),
        ("embedded", None, None),
        ("../shared/lm", None, None),
        ("./lm", None, None),
        ("a/b/c", None, None),
        ("data/train.jsonl", None, None),
        (None, None, None),
        ("tests", None, None),
    ],
)
def test_what_is_a_hub_id(name, here, expected, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert hub_id(name, here) == expected


def test_the_template_in_model_cards_is_the_package_s():
    link = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"
    assert link.is_symlink() and link.samefile(TEMPLATE)


@pytest.mark.parametrize("name", ["demo", "progressive_coding"])
def test_the_rendered_cards_are_whole(name):
    folder = Path(__file__).resolve().parents[2] / "model_cards" / name
    text = (folder / "README.md").read_text()
    assert_clean(text)
    ModelCard.load(folder / "README.md")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures and all((folder / place).stat().st_size < 150_000 for place in pictures)
