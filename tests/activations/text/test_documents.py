import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_matryoshka_sae.activations import DatasetConfig, IndexedDocuments, load_documents

from ...axes import each
from .. import tiny


TEXTS = [f"text {i}" for i in range(23)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _write(path, rows=TEXTS, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: rows, "label": list(range(len(rows)))}), path)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(rows))
    else:
        path.write_text("".join(json.dumps({column: row, "label": i}) + "\n" for i, row in enumerate(rows)))
    return str(path)


def _all(documents, count=4) -> list[str]:
    read = []
    while batch := documents.take(count):
        read += batch
    return read


@each(suffix=[".parquet", ".jsonl", ".json", ".txt"], streaming=[None, True])
def test_files_are_read_in_order(tmp_path, suffix, streaming):
    config = DatasetConfig(_write(tmp_path / f"data{suffix}"), streaming=streaming)
    assert _all(load_documents(config)) == TEXTS


@each(streaming=[False, True], shuffle=[False, True], world_size=[2, 3])
def test_shares_are_disjoint_and_complete(tmp_path, streaming, shuffle, world_size):
    config = DatasetConfig(_write(tmp_path / "data.jsonl"), streaming=streaming)
    shares = [
        _all(load_documents(config, shuffle=shuffle, seed=3, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sorted(sum(shares, [])) == sorted(TEXTS)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_has_its_own_order(tmp_path, streaming):
    config = DatasetConfig(_write(tmp_path / "data.jsonl"), streaming=streaming)
    documents = load_documents(config, shuffle=True, seed=1)
    first = _all(documents)
    documents.next_epoch()
    second = _all(documents)
    assert sorted(first) == sorted(second) == sorted(TEXTS) and first != second != TEXTS


@each(streaming=[False, True], taken=[0, 1, 9, 22])
def test_resumed_equals_uninterrupted(tmp_path, streaming, taken):
    config = DatasetConfig(_write(tmp_path / "data.jsonl"), streaming=streaming)

    def opened():
        return load_documents(config, shuffle=True, seed=1, rank=1, world_size=2)

    documents = opened()
    _all(documents)
    documents.next_epoch()
    documents.take(taken)
    state = json.loads(json.dumps(documents.state_dict()))
    resumed = opened()
    resumed.load_state_dict(state)
    assert _all(resumed) == _all(documents)
    resumed.next_epoch()
    documents.next_epoch()
    assert _all(resumed) == _all(documents)


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    _write(tmp_path / "data" / "train-00000.parquet", TEXTS[:10])
    _write(tmp_path / "data" / "train-00001.parquet", TEXTS[10:])
    _write(tmp_path / "data" / "heldout.parquet", ["held out"])
    assert _all(load_documents(DatasetConfig(str(tmp_path / "data")))) == TEXTS
    assert _all(load_documents(DatasetConfig(str(tmp_path / "data"), split="heldout"))) == ["held out"]
    with pytest.raises(ValueError, match="no file for the split 'test'; it has heldout.parquet"):
        load_documents(DatasetConfig(str(tmp_path / "data"), split="test"))


def test_blank_documents_are_passed_over():
    documents = IndexedDocuments(["", "a", " \n", "b", "c", ""])
    assert documents.take(2) == ["a", "b"] and documents.take(2) == ["c"] and documents.take(2) == []


def test_chat_messages_go_through_the_template(tmp_path):
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    config = DatasetConfig(_write(tmp_path / "chat.jsonl", [messages], "messages"), column="messages")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    assert load_documents(config, tokenizer).take(1) == ["user: w1 assistant: w2 "]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        load_documents(config, tokenizer).take(1)


def test_embedded_text_has_two_splits():
    train, heldout = (_all(load_documents(DatasetConfig("embedded", split=s)), 500) for s in ("train", "heldout"))
    assert len(train) > len(heldout) > 0 and not set(train) & set(heldout)
    with pytest.raises(ValueError, match="'train' and 'heldout'"):
        load_documents(DatasetConfig("embedded", split="test"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "trian.parquet"}, "does not exist. Near it: train.parquet"),  # codespell:ignore
        ({"path": "nowhere/train.parquet"}, "nor does the folder"),
        ({"column": "txt"}, "no column 'txt'; its columns are text, label. Did you mean 'text'"),
        ({"column": "label"}, "holds a int; expected text"),
        ({"path": "empty.parquet"}, "is empty"),
        ({"path": "empty.txt"}, "is empty"),
        ({"path": "notes.md"}, "not a supported file"),
        ({"path": "none"}, "has no .parquet"),
    ],
)
def test_errors_say_what_to_do(tmp_path, change, message):
    _write(tmp_path / "train.parquet")
    _write(tmp_path / "empty.parquet", [])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").write_text("a")
    (tmp_path / "none").mkdir()
    change = {"path": "train.parquet", **change}
    with pytest.raises(ValueError, match=message):
        load_documents(DatasetConfig(**{**change, "path": str(tmp_path / change["path"])})).take(1)


def test_a_hub_id_without_network_is_explained():
    with pytest.raises(ValueError, match="from the Hub.*network.*embedded"):
        load_documents(DatasetConfig("someone/some-text"))


def test_more_processes_than_documents_is_refused():
    with pytest.raises(ValueError, match="2 documents for 3 processes"):
        IndexedDocuments(["a", "b"], world_size=3)
