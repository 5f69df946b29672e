"""The page's endpoints as clients see them: one visitor, many at once, and those who ask for what there is not."""

from concurrent.futures import ThreadPoolExecutor

import pytest


gradio_client = pytest.importorskip("gradio_client")

pytestmark = pytest.mark.slow

ENDPOINTS = {
    "describe": "sae place",
    "measure": "sae place ranking width k",
    "feature": "latent sae place",
    "latents": "sae place sort descending contains start count",
    "search": "query kind sae place width top",
    "family": "latent sae place",
    "read_text": "text sae place width top",
    "activations": "text latent sae place width",
    "search_texts": "texts query sae place width top",
    "reconstruct": "text sae place ranking width k new_tokens",
    "steer": "text latent mode strength sae place width new_tokens temperature seed",
    "compare": "sae place ranking width other other_place other_ranking other_width",
}


@pytest.fixture(scope="module")
def address(endpoints):
    """The page, served by a thread of this process."""
    from hf_matryoshka_sae.space import build_demo, launch

    page = build_demo(endpoints.library)
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def connect(address: str):
    return gradio_client.Client(address, verbose=False, httpx_kwargs={"timeout": 180})


@pytest.fixture(scope="module")
def client(address):
    return connect(address)


def test_endpoints_are_named_typed_and_described(client):
    found = client.view_api(return_format="dict")["named_endpoints"]
    named = {name[1:]: [one["parameter_name"] for one in about["parameters"]] for name, about in found.items()}
    assert named == {name: parameters.split() for name, parameters in ENDPOINTS.items()}
    for name, about in found.items():
        assert about["description"], name
        assert all(one["python_type"]["type"] != "Any" for one in about["parameters"]), name


def test_a_feature_is_what_the_page_shows(client):
    found = client.predict(latent=42, api_name="/feature")
    assert found["latent"] == 42 and len(found["contexts"]) == 10
    (best,) = client.predict(sort="largest activation", count=1, api_name="/latents")
    assert client.predict(latent=best["latent"], api_name="/feature")["max"] == pytest.approx(best["max"])


@pytest.mark.release
def test_many_clients_at_once_see_no_error(address):
    def visit(number: int) -> list[int]:
        client = connect(address)
        found = [client.predict(latent=number * 50 + call, api_name="/feature")["latent"] for call in range(3)]
        found.append(client.predict(text=f"It returns {number} items.", api_name="/read_text")["width"])
        found.append(len(client.predict(start=number, count=7, api_name="/latents")))
        return [*found, client.predict(width=100 + number % 2, api_name="/measure")["width"]]

    with ThreadPoolExecutor(8) as pool:
        everyone = list(pool.map(visit, range(8)))
    for number, found in enumerate(everyone):
        assert found == [*(number * 50 + call for call in range(3)), 2048, 7, 100 + number % 2]


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("/describe", {"sae": "nobody/nothing"}, "'nobody/nothing' cannot be opened"),
        ("/describe", {"sae": 5}, "`sae` must be a text, got 5"),
        ("/feature", {"latent": 2048}, "numbered 0 to 2047, got 2048"),
        ("/feature", {"latent": None}, "`latent` must be a whole number, got None"),
        ("/measure", {"width": "many"}, "`width` must be a whole number, got 'many'"),
        ("/measure", {"width": 64.5}, "`width` must be a whole number, got 64.5"),
        ("/steer", {"text": "a", "latent": 1, "temperature": 1e-300}, "temperature must be 0 or"),
        ("/search", {"query": "((.*)*)*[re `zzzzzz`]"}, ""),
        ("/search", {"query": "(.{10000}){10000}"}, ""),
        ("/read_text", {"text": "a" * 10_000_000}, "10,000,000 characters long"),
    ],
)
def test_what_there_is_not_is_a_message(client, name, asked, message):
    with pytest.raises(gradio_client.exceptions.AppError) as raised:
        client.predict(**asked, api_name=name)
    assert message in str(raised.value)
    assert "Traceback" not in str(raised.value)
