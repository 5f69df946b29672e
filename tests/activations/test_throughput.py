from hf_matryoshka_sae.activations import ActivationStream, TokenStream, harvest_throughput

from . import tiny


def test_throughput_reports_both_rates():
    tokens = TokenStream(tiny.texts(100), tiny.tokenizer(), 16, 4)
    stream = ActivationStream(tiny.llama(), tokens, ["model.layers.0"], 32, 400)
    found = harvest_throughput(stream, batches=4, repeats=1)
    assert found["ratio"] == found["stream_tokens_per_second"] / found["bare_tokens_per_second"] > 0
