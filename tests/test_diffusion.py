"""Diffusion on Gaussian data, where the best denoiser is known in closed form.

Data N(μ, s²) seen as y = x_0 + σ·ε has E[x_0 | y] = μ + s²/(s² + σ²)·(y − μ), and the probability-flow ODE carries y along
(y − μ)/√(s² + σ²) = constant. Formulas here are written again from the papers, never taken from the package.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinydiff import diffusion as df
from tinydiff.diffusion.figures import draw_schedules
from tinydiff.diffusion.schedules import sigmas_of_betas

MU, S = 0.4, 0.5
SD = df.make_schedule("scaled_linear")


def best_denoiser(schedule, mu=MU, s=S):
    def denoise(x, t):
        sigma = math.exp(-0.5 * float(schedule.log_snr(t)))
        y = x * math.sqrt(1 + sigma**2)
        return mu + s**2 / (s**2 + sigma**2) * (y - mu)

    return denoise


def start(n=64, seed=0):
    return np.random.default_rng(seed).standard_normal(n)


# Schedules ----------------------------------------------------------------------------------------------------------


def test_stable_diffusion_levels():
    assert float(SD.sigma_ve(0)) == pytest.approx(0.0292, abs=5e-5)
    assert float(SD.sigma_ve(999)) == pytest.approx(14.6146, abs=5e-5)


@pytest.mark.parametrize("name", df.SCHEDULES)
def test_levels_against_the_papers(name):
    schedule = df.make_schedule(name)
    alpha_bar = []
    product = 1.0
    for i in range(1000):
        if name == "linear":
            product *= 1 - (1e-4 + i / 999 * (0.02 - 1e-4))
        elif name == "scaled_linear":
            product *= 1 - (math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
        elif name == "cosine":
            f = [math.cos((j / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (i, i + 1)]
            product *= 1 - min(1 - f[1] / f[0], 0.999)
        else:
            sigma = (0.002 ** (1 / 7) + i / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
            product = 1 / (1 + sigma**2)
        alpha_bar.append(product)
    t = np.arange(1000)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, alpha_bar, rtol=1e-9)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - np.array(alpha_bar), rtol=1e-7)
    np.testing.assert_allclose(schedule.log_snr(t), np.log(alpha_bar) - np.log1p(-np.array(alpha_bar)), rtol=1e-6, atol=1e-6)


def test_times_between_and_before():
    assert float(SD.sigma_ve(10.25)) == pytest.approx(0.75 * SD.sigmas[10] + 0.25 * SD.sigmas[11], rel=1e-12)
    assert (float(SD.alpha(-1)), float(SD.sigma(-1))) == (1, 0)
    assert SD.log_snr(-1) == np.inf


@given(st.sampled_from(sorted(df.SCHEDULES)), st.floats(-1, 999))
def test_time_inverts_the_level_and_variance_is_preserved(name, t):
    schedule = df.make_schedule(name)
    assert float(schedule.time(schedule.sigma_ve(t))) == pytest.approx(t, abs=1e-7)
    assert float(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) == pytest.approx(1, rel=1e-14)
    assert float(schedule.sigma(t) / schedule.alpha(t)) == pytest.approx(float(schedule.sigma_ve(t)), rel=1e-14)


# Predictions --------------------------------------------------------------------------------------------------------

pictures = arrays(np.float64, (3, 2, 2, 1), elements=st.floats(-3, 3))


@given(pictures, pictures, st.lists(st.floats(0.05, 1.5), min_size=3, max_size=3), st.sampled_from(sorted(df.KINDS)))
def test_every_prediction_gives_back_the_picture_and_the_noise(x0, noise, angles, kind):
    alpha, sigma = np.cos(angles), np.sin(angles)
    x = np.stack([a * p + s * e for a, s, p, e in zip(alpha, sigma, x0, noise)])
    np.testing.assert_allclose(df.add_noise(x0, noise, alpha, sigma), x, atol=1e-12)
    asked = df.target(kind, x0, noise, alpha, sigma)
    np.testing.assert_allclose(df.to_x0(asked, x, alpha, sigma, kind), x0, atol=1e-10)
    np.testing.assert_allclose(df.to_noise(asked, x, alpha, sigma, kind), noise, atol=1e-10)


def test_what_v_is():
    v = df.target("v", np.full((1, 1), 2.0), np.full((1, 1), 3.0), 0.6, 0.8)
    assert v.item() == pytest.approx(0.6 * 3 - 0.8 * 2)


def test_float32_stays_float32():
    x = np.ones((2, 4, 4, 1), np.float32)
    for kind in df.KINDS:
        assert df.target(kind, x, x, SD.alpha(np.array([3, 4])), SD.sigma(np.array([3, 4]))).dtype == np.float32
        assert df.to_x0(x, x, SD.alpha(5), SD.sigma(5), kind).dtype == np.float32
    example = df.make_example(x, np.random.default_rng(0), SD, gamma=5.0)
    assert {example.x.dtype, example.t.dtype, example.target.dtype, example.weight.dtype} == {np.dtype("float32")}
    for name in df.SAMPLERS:
        out = df.sample(name, lambda x, t: 0.5 * x, df.noise_source([1, 2], (4, 4, 1)), SD, 5)
        assert out.dtype == np.float32, name


@given(st.floats(0.02, 1.5), st.floats(0.1, 20))
def test_min_snr_weights(angle, gamma):
    """All three weigh one and the same error of x_0 by min(SNR, γ)."""
    alpha, sigma = math.cos(angle), math.sin(angle)
    expected = min((alpha / sigma) ** 2, gamma)
    x0, noise, wrong = np.array([[0.3]]), np.array([[-1.1]]), np.array([[0.7]])
    x = alpha * x0 + sigma * noise
    implied_noise = (x - alpha * wrong) / sigma
    answers = {"x0": wrong, "noise": implied_noise, "v": alpha * implied_noise - sigma * wrong}
    for kind, answer in answers.items():
        error = ((answer - df.target(kind, x0, noise, alpha, sigma)) ** 2).item()
        assert float(df.min_snr_weight(kind, alpha, sigma, gamma)) * error == pytest.approx(expected * 0.4**2, rel=1e-9), kind


# Training's times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("distribution", df.DISTRIBUTIONS)
def test_draws_follow_the_distribution(distribution, stratified):
    """Kolmogorov–Smirnov's distance to the cumulative distribution, at a level of one in a million."""
    n = 4000
    t = np.sort(df.draw_times(np.random.default_rng(1), n, SD, distribution, stratified))
    assert t.min() >= 0
    assert t.max() <= 999
    if distribution == "uniform":
        assert (t == np.round(t)).all()
        cdf = (t + 1) / 1000
    elif distribution == "lognormal":
        sigma = np.interp(t, np.arange(1000), SD.sigmas)
        cdf = np.array([0.5 * (1 + math.erf((math.log(v) + 1.2) / 1.2 / math.sqrt(2))) for v in sigma])
    else:
        tau = t / 999
        cdf = np.array([0.5 * (1 + math.erf(math.log(v / (1 - v)) / math.sqrt(2))) for v in tau])
    empirical = np.searchsorted(t, t, side="right") / n
    # A clipped or integer time carries a lump of probability: compare where the draws end, not inside a lump.
    inside = (t > 0) & (t < 999)
    distance = np.abs(empirical - cdf)[inside].max()
    assert distance < (2 / n if stratified else 2.7 / math.sqrt(n))


def test_example_is_made_of_its_parts():
    x0 = np.random.default_rng(0).uniform(-1, 1, (5000, 2, 2, 1))
    e = df.make_example(x0, np.random.default_rng(2), SD, "noise", gamma=5.0)
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[e.t.astype(int)]
    noise = (e.x - np.sqrt(alpha_bar)[:, None, None, None] * x0) / np.sqrt(1 - alpha_bar)[:, None, None, None]
    np.testing.assert_allclose(e.target, noise, atol=1e-8)
    snr = alpha_bar / (1 - alpha_bar)
    np.testing.assert_allclose(e.weight, np.minimum(snr, 5) / snr, rtol=1e-6)
    assert abs(e.target.mean()) < 5 / math.sqrt(e.target.size)
    assert abs(e.target.var() - 1) < 5 * math.sqrt(2 / e.target.size)


# Times --------------------------------------------------------------------------------------------------------------


def test_stable_diffusion_times():
    assert df.timesteps(SD, 50, **df.SD1["ddim"]).tolist() == [*range(981, 0, -20), 0]
    euler = df.timesteps(SD, 30, **df.SD1["euler"])
    np.testing.assert_allclose(euler, [*(999 - 999 * i / 29 for i in range(30)), -1], atol=1e-9)
    dpm = df.timesteps(SD, 20, **df.SD1["dpmpp_2m"])
    assert dpm.tolist() == [*(round(999 * (20 - i) / 20) for i in range(20)), -1]
    assert df.timesteps(SD, 4, "trailing").tolist() == [999, 749, 499, 249, -1]
    assert df.timesteps(SD, 1000).tolist() == list(range(999, -2, -1))


def test_karras_times():
    times = df.timesteps(SD, 10, "karras")
    sigma = np.interp(times[:-1], np.arange(1000), SD.sigmas)
    low, high = (SD.sigmas[i] ** (1 / 7) for i in (0, -1))
    np.testing.assert_allclose(sigma, [(high + i / 9 * (low - high)) ** 7 for i in range(10)], rtol=1e-9)
    assert sigma[0] == pytest.approx(14.6146, abs=5e-5)
    assert sigma[-1] == pytest.approx(0.0292, abs=5e-5)
    assert df.timesteps(SD, 10, "karras", final=0.0).tolist() == pytest.approx([*times[:-2], 0])
    wide = df.make_schedule("cosine")
    assert float(wide.sigma_ve(df.timesteps(wide, 5, "karras")[0])) == pytest.approx(80)


@given(st.sampled_from(sorted(df.SCHEDULES)), st.sampled_from(sorted(df.SPACINGS)), st.integers(1, 500))
def test_times_always_fall(schedule, spacing, steps):
    times = df.timesteps(df.make_schedule(schedule), steps, spacing)
    assert times.shape == (steps + 1,)
    assert (np.diff(times) < 0).all()
    assert times[0] <= 999
    assert times[-1] == -1


def test_strength():
    times = df.timesteps(SD, 50)
    for strength, steps in ((1.0, 50), (0.75, 37), (0.01, 0), (0.0, 0)):
        assert len(df.from_strength(times, strength)) == steps + 1
        assert df.from_strength(times, strength)[-1] == -1


# Samplers -----------------------------------------------------------------------------------------------------------


def final_error(name, steps):
    """Distance from the ODE's exact solution at the schedule's first noise level, starting at its last."""
    schedule = df.make_schedule("karras", sigma_min=0.02, sigma_max=20)
    times = df.timesteps(schedule, steps, "karras", final=0.0)
    x = start()
    y = x * math.sqrt(1 + 20**2)
    exact = MU + (y - MU) * math.sqrt((S**2 + 0.02**2) / (S**2 + 20**2))
    walked = df.SAMPLERS[name](best_denoiser(schedule), x, schedule, times)
    return np.abs(walked * math.sqrt(1 + 0.02**2) - exact).max()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    coarse, fine = final_error(name, 128), final_error(name, 256)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert fine < (5e-2 if order == 1 else 1e-3)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_deterministic_samplers_carry_the_exact_mean_and_variance(name):
    """Each is affine on Gaussian data: its slope is the standard deviation that it gives, its offset the mean."""
    x = np.array([0.0, 1.0])
    mean, shifted = df.SAMPLERS[name](best_denoiser(SD), x, SD, df.timesteps(SD, 1000))
    sigma = float(SD.sigmas[-1])
    # The ODE started from N(0, 1) in place of the marginal at t = T − 1, whose mean is α·μ.
    slope = math.sqrt(1 + sigma**2) * S / math.sqrt(S**2 + sigma**2)
    assert shifted - mean == pytest.approx(slope, rel=0.005)
    assert mean == pytest.approx(MU * (1 - S / math.sqrt(S**2 + sigma**2)), abs=0.005)


def ancestral_moments(stride):
    """Mean and variance after walking the linear schedule by q(x_s | x_t, x_0) of Ho et al., every `stride`-th t from 999."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    mean, var = 0.0, 1.0
    for t in range(999, -1, -stride):
        before = alpha_bar[t - stride] if t >= stride else 1.0
        beta = 1 - alpha_bar[t] / before
        gain = S**2 * math.sqrt(alpha_bar[t]) / (S**2 * alpha_bar[t] + 1 - alpha_bar[t])  # E[x_0 | x] = μ + gain·(x − √ᾱ·μ)
        from_x0 = math.sqrt(before) * beta / (1 - alpha_bar[t])
        from_x = math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar[t])
        mean = from_x0 * (MU + gain * (mean - math.sqrt(alpha_bar[t]) * MU)) + from_x * mean
        var = (from_x0 * gain + from_x) ** 2 * var + (1 - before) / (1 - alpha_bar[t]) * beta
    return mean, var


@pytest.mark.parametrize(("name", "stride", "n"), [("ddpm", 4, 40_000), ("euler_ancestral", 4, 40_000), ("ddpm", 1, 10_000)])
def test_stochastic_samplers_give_the_mean_and_variance(name, stride, n):
    """Within five standard errors of the moments of that many steps (which are the data's only in the limit, see below)."""
    rng = np.random.default_rng(3)
    schedule = df.make_schedule("linear")
    times = df.timesteps(schedule, 1000 // stride)
    x = df.SAMPLERS[name](best_denoiser(schedule), rng.standard_normal(n), schedule, times, noise=lambda: rng.standard_normal(n))
    mean, var = ancestral_moments(stride)
    assert x.mean() == pytest.approx(mean, abs=5 * math.sqrt(var / n))
    assert x.var() == pytest.approx(var, abs=5 * var * math.sqrt(2 / n))


def test_ancestral_moments_tend_to_the_data():
    """The oracle above, extrapolated to infinitely many steps: its bias is of first order."""
    for at_one, at_two, exact in zip(ancestral_moments(1), ancestral_moments(2), (MU, S**2)):
        assert 2 * at_one - at_two == pytest.approx(exact, rel=2e-3)


def test_dpmpp_2m_on_uneven_steps():
    """Lu et al.'s algorithm 2 written out in λ for three steps of different lengths (an even grid hides their ratio)."""
    times = [900, 500, 300, 250]
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[times]
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    h = np.diff(np.log(alpha / sigma))
    answers = [0.3, -0.2, 0.9]
    d = (1 + h[1] / h[0] / 2) * answers[1] - h[1] / h[0] / 2 * answers[0]
    x = 0.7
    for i, x0 in enumerate((answers[0], d, answers[2])):
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h[i]) * x0
    told = iter(answers)
    walked = df.dpmpp_2m(lambda x, t: np.full_like(x, next(told)), np.array([0.7]), SD, times)
    assert walked.item() == pytest.approx(x, rel=1e-9)


def one_step(sampler, eps, **options):
    """From t = 600 to 400 with a fixed answer and fresh noise `eps`."""
    x = np.array([[0.8, -0.3]])
    return sampler(lambda x, t: np.full_like(x, 0.1), x, SD, [600, 400], noise=lambda: eps, **options)


def test_ddim_at_eta_1_has_the_posterior_variance_of_ddpm():
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    now, after = alpha_bar[600], alpha_bar[400]
    variance = (1 - after) / (1 - now) * (1 - now / after)
    mean = math.sqrt(after) * (1 - now / after) / (1 - now) * 0.1 + math.sqrt(now / after) * (1 - after) / (1 - now) * 0.8
    zero, unit = np.zeros((1, 2)), np.ones((1, 2))
    for sampler, options in ((df.ddim, {"eta": 1.0}), (df.ddpm, {}), (df.euler_ancestral, {})):
        still, moved = one_step(sampler, zero, **options), one_step(sampler, unit, **options)
        assert ((moved - still) ** 2).ravel() == pytest.approx([variance, variance], rel=1e-9)
        assert still[0, 0] == pytest.approx(mean, rel=1e-9)
    half = one_step(df.ddim, unit, eta=0.5) - one_step(df.ddim, zero, eta=0.5)
    assert (half**2).ravel() == pytest.approx([variance / 4, variance / 4], rel=1e-9)


@pytest.mark.parametrize("spacing", df.SPACINGS)
def test_one_family_of_steps(spacing):
    """euler is ddim at η = 0; euler_ancestral is ddpm is ddim at η = 1: three derivations, one walk."""
    times, denoise, x = df.timesteps(SD, 12, spacing), best_denoiser(SD), start()

    def noise():
        rng = np.random.default_rng(5)
        return lambda: rng.standard_normal(x.shape)

    np.testing.assert_allclose(df.euler(denoise, x, SD, times), df.ddim(denoise, x, SD, times), rtol=1e-9, atol=1e-12)
    walk = df.ddpm(denoise, x, SD, times, noise=noise())
    np.testing.assert_allclose(df.ddim(denoise, x, SD, times, eta=1.0, noise=noise()), walk, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(df.euler_ancestral(denoise, x, SD, times, noise=noise()), walk, rtol=1e-9, atol=1e-9)


def test_subtract_takes_a_constant_times_the_noise_away():
    schedule = df.make_schedule("karras", sigma_min=0.01, sigma_max=10)
    denoise, x = best_denoiser(schedule), start()
    y = x * math.sqrt(1 + 10**2)
    for level in (10.0, 7.5, 5.0, 2.5):
        x0 = MU + S**2 / (S**2 + level**2) * (y - MU)
        y = y - 2.5 * (y - x0) / level
    np.testing.assert_allclose(df.subtract(denoise, x, schedule, df.timesteps(schedule, 4)), y, rtol=1e-9)
    # Half of the constant leaves half of the noise.
    left = df.subtract(denoise, x, schedule, df.timesteps(schedule, 4), constant=1.25)
    y = x * math.sqrt(1 + 10**2)
    for level in (10.0, 8.75, 7.5, 6.25):
        y = y - 1.25 * (y - MU - S**2 / (S**2 + level**2) * (y - MU)) / level
    np.testing.assert_allclose(left, y, rtol=1e-9)


@pytest.mark.parametrize("std", [0.5, 0.1])
def test_schedules_do_better_than_subtracting_a_constant(std):
    """Error of the standard deviation drawn: ten good steps beat a hundred of the plainest loop, and as many beat as many."""
    sigma = float(SD.sigmas[-1])
    exact = math.sqrt(1 + sigma**2) * std / math.sqrt(std**2 + sigma**2)

    def error(name, steps, spacing):
        walk = df.SAMPLERS[name]
        low, high = walk(best_denoiser(SD, s=std), np.array([0.0, 1.0]), SD, df.timesteps(SD, steps, spacing))
        return abs(high - low - exact)

    assert error("dpmpp_2m", 10, "karras") < error("subtract", 100, "trailing")
    assert error("ddim", 50, "trailing") < error("subtract", 50, "trailing")


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 6), ("heun", 11), ("dpmpp_2m", 6), ("ddpm", 6), ("subtract", 6)])
def test_evaluations_and_callback(name, evaluations):
    calls, seen = [], []

    def denoise(x, t):
        calls.append(t)
        return 0 * x + 0.25

    out = df.sample(
        name, denoise, df.noise_source([0], (2,)), SD, 6, callback=lambda step, t, x, x0: seen.append((step, t, x0[0, 0]))
    )
    assert len(calls) == evaluations
    assert [step for step, _, _ in seen] == list(range(6))
    assert all(x0 == 0.25 for *_, x0 in seen)
    assert all(isinstance(t, float) for t in calls)
    np.testing.assert_allclose(out, 0.25, atol=1e-5)  # a network sure of its answer gets it


def test_sampling_from_a_picture():
    picture = np.full((2, 3), 0.7, np.float32)
    source = df.noise_source([4, 5], (3,))
    first_noise = df.noise_source([4, 5], (3,))()
    seen = []
    df.sample("ddim", lambda x, t: 0 * x, source, SD, 10, picture=picture, strength=0.3, callback=lambda *step: seen.append(step))
    assert [t for _, t, *_ in seen] == [299, 199, 99]
    alpha_bar = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[:300] ** 2)
    np.testing.assert_allclose(seen[0][2], math.sqrt(alpha_bar) * 0.7 + math.sqrt(1 - alpha_bar) * first_noise, rtol=1e-5)
    kept = df.sample("ddim", lambda x, t: 0 * x, source, SD, 10, picture=picture, strength=0.0)
    np.testing.assert_array_equal(kept, picture)


@pytest.mark.parametrize("kind", df.KINDS)
def test_denoiser_of_any_kind(kind):
    alpha, sigma = float(SD.alpha(300)), float(SD.sigma(300))
    x0, noise = np.full((1, 2), 1.5), np.full((1, 2), -0.4)
    x = alpha * x0 + sigma * noise
    answer = {"x0": x0, "noise": noise, "v": alpha * noise - sigma * x0}[kind]
    np.testing.assert_allclose(df.denoiser(lambda x, t: answer, SD, kind)(x, 300.0), 1.5)
    np.testing.assert_allclose(df.denoiser(lambda x, t: answer, SD, kind, clip=1.0)(x, 300.0), 1.0)


# Seeds and guidance -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
@settings(max_examples=20)
def test_a_sample_depends_on_its_own_seed(seeds):
    def draw(seeds):
        return df.sample("ddpm", best_denoiser(SD), df.noise_source(seeds, (4, 4, 1)), SD, 5)

    together = draw(seeds)
    for i, seed in enumerate(seeds):
        np.testing.assert_array_equal(together[i], draw([seed])[0])
    np.testing.assert_array_equal(draw(seeds[::-1]), together[::-1])


def test_noise_is_fresh_and_standard_normal():
    noise = df.noise_source(range(100), (20, 20))
    first, second = noise(), noise()
    both = np.concatenate([first, second], axis=1).reshape(100, -1).astype(np.float64)
    assert abs(both.mean()) < 5 / math.sqrt(both.size)
    assert abs(both.var() - 1) < 5 * math.sqrt(2 / both.size)
    # Independent between calls and between samples: no correlation beyond six standard errors among the pairs.
    assert abs((first * second).mean()) < 5 / math.sqrt(first.size)
    correlation = both @ both.T / both.shape[1] - np.eye(100)
    assert np.abs(correlation[~np.eye(100, dtype=bool)]).max() < 6 / math.sqrt(both.shape[1])


class Model:
    """Answers x·label + t, and counts the samples that it was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, labels):
        self.batches.append(len(x))
        return x * labels[:, None] + t[:, None]


def test_guidance():
    x, labels, model = np.array([[1.0], [2.0]]), np.array([3, 5]), Model()
    t = 7.0
    unguided = df.guide(model, labels, 10, 1.0)(x, t)
    np.testing.assert_array_equal(unguided, model(x, np.full(2, 7.0), labels))
    np.testing.assert_array_equal(df.guide(model, labels, 10, 0.0)(x, t), [[17], [27]])
    assert model.batches == [2, 2, 2]
    guided = df.guide(model, labels, 10, 2.5)(x, t)
    assert model.batches[-1] == 4
    np.testing.assert_allclose(guided, [[17 + 2.5 * (10 - 17)], [27 + 2.5 * (17 - 27)]])
    near = df.guide(model, labels, 10, 1 + 1e-12)(x, t)
    np.testing.assert_allclose(near, unguided, atol=1e-9)


# Bad input, and the picture -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: df.make_schedule("cosin"), "did you mean 'cosine'"),
        (lambda: df.make_schedule("zzz"), "choose from linear"),
        (lambda: df.make_schedule("linear", 1), "timesteps = 1"),
        (lambda: df.make_schedule("linear", beta_end=1.5), "betas must lie"),
        (lambda: df.Schedule("mine", np.array([2.0, 1.0])), "increasing"),
        (lambda: df.Schedule("mine", np.array([1.0, np.nan])), "increasing"),
        (lambda: SD.alpha(1000), "outside"),
        (lambda: SD.alpha(np.nan), "outside"),
        (lambda: SD.time(-1), "at least 0"),
        (lambda: df.timesteps(SD, 0), "steps = 0"),
        (lambda: df.timesteps(SD, 1001), "steps = 1001"),
        (lambda: df.timesteps(SD, 1000, "leading", offset=1), "take fewer"),
        (lambda: df.timesteps(SD, 5, "trail"), "did you mean 'trailing'"),
        (lambda: df.timesteps(SD, 5, "karras", sigma_max=100.0), "inside the schedule's"),
        (lambda: df.from_strength(df.timesteps(SD, 5), 1.5), "strength = 1.5"),
        (lambda: df.target("epsilon", np.ones(1), np.ones(1), 1, 0), "choose from noise"),
        (lambda: df.to_x0(np.ones((1, 1)), np.ones((1, 1)), 0, 1, "noise"), "alpha = 0"),
        (lambda: df.to_noise(np.ones((1, 1)), np.ones((1, 1)), 1, 0, "x0"), "sigma = 0"),
        (lambda: df.add_noise(np.ones((2, 1)), np.ones((2, 1)), np.ones(3), 1), "one value a sample"),
        (lambda: df.min_snr_weight("v", 0.5, 0.5, 0), "gamma = 0"),
        (lambda: df.draw_times(np.random.default_rng(0), 3, SD, "log_normal"), "did you mean 'lognormal'"),
        (lambda: df.make_example(np.ones((1, 2), np.uint8), np.random.default_rng(0), SD), "uint8"),
        (lambda: df.noise_source([1, -2], (2,)), "seed -2"),
        (lambda: df.noise_source([1.5], (2,)), "seed 1.5"),
        (lambda: df.ddpm(lambda x, t: x, np.ones(2), SD, [5, -1]), "noise_source"),
        (lambda: df.ddim(lambda x, t: x, np.ones(2), SD, [5, -1], eta=2), "eta = 2"),
        (lambda: df.euler(lambda x, t: x, np.ones(2), SD, [5, 6]), "decreasing"),
        (lambda: df.sample("dppm", lambda x, t: x, lambda: np.ones(2), SD), "did you mean 'ddpm'"),
        (lambda: df.sample("ddim", lambda x, t: x, lambda: np.ones(2), SD, strength=0.5), "needs a picture"),
        (lambda: df.guide(Model(), np.array([1]), 0, float("nan")), "guidance scale"),
        (lambda: df.guide(Model(), np.array([1]), 0)(np.ones((2, 1)), 1.0), "2 samples, but 1"),
        (lambda: df.denoiser(lambda x, t: x[:1], SD, "v")(np.ones((2, 1)), 1.0), "must agree"),
        (lambda: draw_schedules(np.ones((2, 2, 3))), r"\(2, 2, 3\)"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_no_betas_are_lost_to_rounding():
    """1 − ᾱ of one tiny step is that step's β, to all digits."""
    assert sigmas_of_betas(np.array([1e-12, 1e-3]))[0] == pytest.approx(1e-6, rel=1e-12)


def test_the_picture_of_schedules():
    from io import BytesIO

    from PIL import Image

    digit = np.full((28, 28, 1), -1.0)
    digit[8:20, 12:16] = 1
    png = draw_schedules(digit)
    image = np.asarray(Image.open(BytesIO(png)).convert("L"))
    assert image.shape[0] > 500
    assert len(np.unique(image)) > 50
    assert draw_schedules(-digit) != png
