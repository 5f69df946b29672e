"""The page's endpoints as clients see them: one visitor, many at once, and those who ask for what there is not."""

from concurrent.futures import ThreadPoolExecutor

import pytest


gradio_client = pytest.importorskip("gradio_client")

pytestmark = pytest.mark.slow

ENDPOINTS = {
    "/describe": {"sae", "place"},
    "/measure": {"sae", "place", "ranking", "width", "k"},
    "/feature": {"latent", "sae", "place"},
    "/latents": {"sae", "place", "sort", "descending", "contains", "start", "count"},
    "/search": {"query", "kind", "sae", "place", "width", "top"},
    "/family": {"latent", "sae", "place"},
    "/read_text": {"text", "sae", "place", "width", "top"},
    "/activations": {"text", "latent", "sae", "place", "width"},
    "/reconstruct": {"text", "sae", "place", "ranking", "width", "k", "new_tokens"},
    "/steer": {
        "text",
        "latent",
        "mode",
        "strength",
        "sae",
        "place",
        "width",
        "new_tokens",
        "temperature",
        "seed",
    },
    "/compare": {
        "sae",
        "place",
        "ranking",
        "width",
        "other",
        "other_place",
        "other_ranking",
        "other_width",
    },
}


@pytest.fixture(scope="module")
def client(space):
    return gradio_client.Client(space, verbose=False)


def test_endpoints_are_named_typed_and_described(client):
    found = client.view_api(return_format="dict")["named_endpoints"]
    assert {name: {one["parameter_name"] for one in about["parameters"]} for name, about in found.items()} == ENDPOINTS
    for name, about in found.items():
        assert about["description"], name
        assert all(one["python_type"]["type"] != "Any" for one in about["parameters"]), name


def test_a_feature_is_what_the_page_shows(client):
    found = client.predict(latent=42, api_name="/feature")
    assert found["latent"] == 42 and len(found["contexts"]) == 12
    (best,) = client.predict(sort="largest activation", count=1, api_name="/latents")
    assert client.predict(latent=best["latent"], api_name="/feature")["max"] == pytest.approx(best["max"])


def test_twenty_clients_at_once_see_no_error(space):
    def visit(number: int) -> list[int]:
        client = gradio_client.Client(space, verbose=False)
        found = [client.predict(latent=number * 50 + call, api_name="/feature")["latent"] for call in range(5)]
        found.append(client.predict(text=f"It returns {number} items.", api_name="/read_text")["width"])
        found.append(len(client.predict(start=number, count=7, api_name="/latents")))
        if number % 5 == 0:
            found.append(client.predict(width=100 + number, api_name="/measure")["width"])
        return found

    with ThreadPoolExecutor(20) as pool:
        everyone = list(pool.map(visit, range(20)))
    for number, found in enumerate(everyone):
        wanted = [*(number * 50 + call for call in range(5)), 2048, 7]
        assert found == (wanted if number % 5 else [*wanted, 100 + number])


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("/describe", {"sae": "nobody/nothing"}, "'nobody/nothing' cannot be opened"),
        ("/describe", {"sae": " "}, "Name a repository"),
        ("/describe", {"sae": "embedded", "place": "elsewhere"}, "holds no SAE at 'elsewhere'"),
        ("/feature", {"latent": 2048}, "numbered 0 to 2047, got 2048"),
        ("/feature", {"latent": -1}, "numbered 0 to 2047, got -1"),
        ("/measure", {"width": 3000}, "between 1 and 2048, got 3000"),
        ("/measure", {"ranking": "best"}, "Rankings are"),
        ("/measure", {"width": "many"}, "`width` must be a whole number, got 'many'"),
        ("/measure", {"width": 64.5}, "`width` must be a whole number, got 64.5"),
        ("/feature", {"latent": None}, "`latent` must be a whole number, got None"),
        ("/describe", {"sae": 5}, "`sae` must be a text, got 5"),
        ("/steer", {"text": "a", "latent": 1, "temperature": 1e-300}, "temperature must be 0 or"),
        ("/latents", {"sort": "beauty"}, "sorted by"),
        ("/search", {"query": "(a"}, "(a"),
        ("/search", {"query": "((.*)*)*[re `zzzzzz`]"}, ""),
        ("/search", {"query": "(.{10000}){10000}"}, ""),
        ("/search", {"query": " "}, "Write a pattern"),
        ("/read_text", {"text": ""}, "Write or paste a text"),
        ("/read_text", {"text": "a" * 10_000_000}, "10,000,000 characters long"),
        ("/steer", {"text": "a", "latent": 4000}, "numbered 0 to 2047, got 4000"),
        ("/steer", {"text": "a", "latent": 1, "mode": "bend"}, "bend"),
        ("/reconstruct", {"text": "a", "new_tokens": 10_000}, "up to 100 tokens"),
    ],
)
def test_what_there_is_not_is_a_message(client, name, asked, message):
    with pytest.raises(gradio_client.exceptions.AppError) as raised:
        client.predict(**asked, api_name=name)
    assert message in str(raised.value)
    assert "Traceback" not in str(raised.value)
