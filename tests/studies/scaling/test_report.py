"""From points to laws: files, held-out points, what cannot be fitted, points of somebody else."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hf_matryoshka_sae.studies.scaling.command import main
from hf_matryoshka_sae.studies.scaling.laws import PUBLISHED_GPT4
from hf_matryoshka_sae.studies.scaling.points import Point, read_points, training_flops, write_points
from hf_matryoshka_sae.studies.scaling.report import fit_points


def published(num_latents, k):
    a, bk, bn, g, z, e = PUBLISHED_GPT4.values()
    n, k = np.log(num_latents), np.log(k)
    return float(np.exp(a + bk * k + bn * n + g * k * n) + np.exp(z + e * k))


def gpt4_points():
    return [Point(2**i, k, published(2**i, k)) for i in range(11, 25) for k in (8, 16, 32, 64, 128, 256, 512)]


def trained_points(noise=0.01):
    """As of a sweep: three budgets, 4 x 3 SAEs, two of them held out."""
    random = np.random.default_rng(0)
    return [
        Point(
            size,
            k,
            (4 * k**-0.3 * size**-0.35 + 0.2 * k**-0.4) * (1 + 30_000 / tokens) * np.exp(noise * random.normal()),
            tokens,
            training_flops(size, k, tokens, 16),
            held_out=(size, k) in ((256, 8), (512, 32)),
        )
        for tokens in (100_000, 200_000, 400_000)
        for k in (8, 16, 32)
        for size in (128, 256, 512, 1024, 2048)
    ]


def test_the_command_recovers_the_published_constants_from_somebody_elses_points(tmp_path, capsys):
    path = tmp_path / "gpt4.csv"
    lines = [f"{p.num_latents},{p.k},{p.loss:.6f}" for p in gpt4_points()]
    path.write_text("\n".join(["num_latents,k,loss", *lines]))
    folder = tmp_path / "fits"
    assert main(["--points", str(path), "--output_dir", str(folder), "--resamples", "20"]) == 0
    printed = capsys.readouterr().out
    (budget,) = json.loads((folder / "sweep.json").read_text())["budgets"]
    assert budget["joint"]["constants"] == pytest.approx(PUBLISHED_GPT4, rel=0.05)
    assert (folder / "report.md").read_text() in printed
    assert "beta_n -0.017" in printed
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert read_points(folder / "sweep.csv") == read_points(path)


def test_held_out_points_are_tested_on_and_never_fitted_to():
    points = trained_points()
    report = fit_points(points, resamples=0)
    spoilt = fit_points([replace(p, loss=9 * p.loss) if p.held_out else p for p in points], resamples=0)
    for one, other in zip(report.budgets, spoilt.budgets, strict=True):
        assert one.joint == other.joint and one.sizes == other.sizes
        assert one.joint.points == 13
        assert other.held_out["joint"] == pytest.approx(8 / 9, abs=0.05)
    assert report.compute == spoilt.compute


def test_held_out_errors_are_what_the_definitions_say():
    points = [p for p in trained_points() if p.tokens == 400_000]
    (fits,) = fit_points(points, resamples=0).budgets
    fitted, tests = [p for p in points if not p.held_out], [p for p in points if p.held_out]
    mean = np.exp(np.mean([np.log(p.loss) for p in fitted]))

    def nearest(test):
        return min(fitted, key=lambda p: np.hypot(np.log(p.num_latents / test.num_latents), np.log(p.k / test.k))).loss

    def error(predict):
        return np.mean([abs(predict(p) - p.loss) / p.loss for p in tests])

    assert fits.held_out["mean"] == pytest.approx(error(lambda p: mean))
    assert fits.held_out["joint"] == pytest.approx(error(lambda p: fits.joint.predict(p.num_latents, p.k)))
    assert fits.held_out["size"] == pytest.approx(error(lambda p: fits.sizes[p.k].predict(p.num_latents)))
    assert fits.held_out["joint"] < 0.03 < fits.held_out["mean"]
    # (256, 8) has neighbours of 128 and 512 latents as near as each other: either may be taken.
    assert fits.held_out["nearest"] == pytest.approx(error(nearest), abs=0.05)


def test_a_plane_predicts_exactly_where_the_losses_are_one():
    points = [
        Point(n, k, n**-0.3 * k**-0.5, held_out=(n, k) == (512, 8)) for n in (256, 512, 1024) for k in (4, 8, 16)
    ]
    report = fit_points(points, resamples=0)
    assert report.budgets[0].held_out["plane"] == pytest.approx(0, abs=1e-10)
    assert not report.compute  # there is no compute column


def test_what_cannot_be_fitted_is_noted_and_the_rest_is(tmp_path):
    points = [Point(n, 8, n**-0.3 + 0.1, 1000) for n in (64, 128, 256, 512, 1024)] + [Point(64, 16, 0.2, 1000)]
    report = fit_points(points[:5], resamples=0)
    assert report.budgets[0].joint is None and 8 in report.budgets[0].sizes
    assert any("1,000 tokens, L(F, k)" in note and "more than 6" in note for note in report.notes)
    report.save(tmp_path)
    assert "## Not fitted" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "scaling.png").is_file()
    with pytest.raises(ValueError, match="No law can be fitted.*more than 3 points, got 2"):
        fit_points(points[:2])


def test_the_report_shows_every_point_law_and_error():
    text = str(fit_points(trained_points(), resamples=20))
    assert "# Scaling laws of 45 SAEs" in text
    assert text.count("| L(F, k) | alpha") == 3 and text.count("| L(C), k = ") == 3
    assert text.count("baseline: the mean") == 3 and "what predicts the 2 held-out points" in text
    assert text.count("| yes |") == 6


@pytest.mark.parametrize("num_latents, k, tokens, d_in", [(4096, 16, 1000, 128), (64, 64, 1, 8)])
def test_flops_count_the_products(num_latents, k, tokens, d_in):
    encoder = 2 * num_latents * d_in
    through_pairs = 2 * k * d_in  # decode, gradient of the values, of W_dec, of W_enc
    assert training_flops(num_latents, k, tokens, d_in) == tokens * (encoder + 4 * through_pairs)


def test_points_survive_a_file(tmp_path):
    points = trained_points()
    write_points(points, tmp_path / "points.csv")
    assert read_points(tmp_path / "points.csv") == points


@pytest.mark.parametrize(
    "text, message",
    [
        ("num_latents,loss\n4,1", "lacks k: its columns must be"),
        ("num_latents,k,loss,size\n4,1,1,1", "has unknown size"),
        ("num_latents,k,loss\n4,1,lots", "line 2, loss: expected a number, got 'lots'"),
        ("num_latents,k,loss\n4,1,1\n4.5,1,1", "line 3, num_latents: expected a whole number"),
        ("num_latents,k,loss\n4,1,", "line 2: num_latents, k and loss must have values"),
        ("", "lacks k, loss, num_latents"),
    ],
)
def test_files_that_are_no_points_are_refused(tmp_path, capsys, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    assert main(["--points", str(path), "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_command_wants_one_source_and_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    for arguments in ([], ["--config", "a", "--points", "b"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert main(["--points", str(tmp_path / "none.csv")]) == 2
    assert main(["--points", "a.csv", "--batch_size", "3"]) == 2
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--points", "a.csv"]) == 2
    errors = capsys.readouterr().err
    for message in ("cannot be read", "--batch_size means nothing", "no config file", "without `accelerate launch`"):
        assert message in errors
