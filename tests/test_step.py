"""One update against the textbook: LDM's losses, each differentiated for itself."""

import copy

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

from latent_ae.data import normalize
from latent_ae.training.prepare import prepare
from latent_ae.training.step import _accumulate, update

pytestmark = pytest.mark.usefixtures("one_thread")

ADVERSARY = {"start": 0, "warmup_steps": 0, "channels": 8, "layers": 2, "weight": 0.7}


@pytest.fixture
def adversarial(tiny):
    """Builds a run with an adversary that is heard from the first step."""

    def build(adversary=None, **sections):
        heard = ADVERSARY | (adversary or {})
        sections = {"validation": None, "bottleneck": {"weight": 1e-3}} | sections
        return prepare(tiny(adversary=heard, **sections))

    return build


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_same(ours, theirs):
    """Each tensor to 1e-4 of its length: single elements may be zero but for rounding."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def textbook(run, images, weight=0.7):
    """LDM's two steps from the same weights and the same noise: gradients of both networks."""
    network = copy.deepcopy(run.autoencoder)
    judge = copy.deepcopy(run.rule)
    reconstruction = network(images)
    losses = run.objective(images, reconstruction, run.step).total
    last = network.network.decoder.conv_out.weight
    wish = -judge.discriminator(reconstruction.images).mean()
    g_rec, g_adv = (
        torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (losses, wish)
    )
    elements = images[0].numel()
    adaptive = (g_rec.norm() / (g_adv.norm() + 1e-4)).clamp(0, 1e4 / elements).detach()
    judge.requires_grad_(False)
    (losses + adaptive * weight * wish).backward()
    judge.requires_grad_(True)
    real, fake = judge.discriminator(images), judge.discriminator(reconstruction.images.detach())
    hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    hinge.backward()
    return network, judge, adaptive * elements


def test_gradients_are_the_textbooks(adversarial):
    run = adversarial()
    images = normalize(next(run.stream).images)
    torch.manual_seed(7)
    network, judge, adaptive = textbook(run, images)
    torch.manual_seed(7)
    terms = _accumulate(run, images)
    for ours, theirs in ((run.autoencoder, network), (run.adversary, judge)):
        assert_same(gradients(ours), gradients(theirs))
    assert terms["adaptive_weight"].item() == pytest.approx(adaptive.item(), rel=1e-4)


@pytest.mark.parametrize("largest", [1e12, 1.0])
def test_the_adversary_weighs_the_same_whatever_the_variance(adversarial, largest):
    """The optimal one's gradients are those of the fixed weight that it implies, over exp(s).

    Also where the adaptive weight is at its bound.
    """

    def gradients_and_terms(weight, **losses):
        run = adversarial(
            {"adaptive_max": largest},
            bottleneck={"weight": weight},
            losses={"pixel": "l2"} | losses,
        )
        images = normalize(next(run.stream).images)
        torch.manual_seed(7)
        terms = _accumulate(run, images)
        return gradients(run.autoencoder), terms

    optimal, terms = gradients_and_terms(2.0, variance="optimal")
    fixed, plain = gradients_and_terms(terms["implied_weight"].item())
    weight = plain["adaptive_weight"].item()
    assert (weight == pytest.approx(largest)) == (largest == 1.0)
    assert terms["adaptive_weight"].item() == pytest.approx(weight, rel=1e-4)
    assert_same([terms["logvar"].exp() * g for g in optimal], fixed)


def test_without_the_adaptive_weight_the_term_weighs_as_written(adversarial):
    run = adversarial({"adaptive": False})
    images = normalize(next(run.stream).images)
    network, wish = copy.deepcopy(run.autoencoder), copy.deepcopy(run.rule.discriminator)
    torch.manual_seed(7)
    reconstruction = network(images)
    losses = run.objective(images, reconstruction, 0).total
    (losses - 0.7 * wish(reconstruction.images).mean()).backward()
    torch.manual_seed(7)
    assert "adaptive_weight" not in _accumulate(run, images)
    assert_same(gradients(run.autoencoder), gradients(network))


def test_accumulation_averages_both_networks_gradients(adversarial, monkeypatch):
    """Two micro-steps of accumulation leave the mean of what each gives alone."""
    noiseless = {"bottleneck": {"weight": 0}, "losses": {"perceptual": None}}
    taken = []

    def gather(run):
        taken.append(gradients(run.autoencoder) + gradients(run.adversary))
        return {}

    monkeypatch.setattr("latent_ae.training.step._apply", gather)
    update(adversarial(training={"accumulation": 2}, **noiseless))
    alone = adversarial(**noiseless)
    update(alone)
    update(alone)  # the gradients of the first are still there
    assert_same([2 * g for g in taken[0]], taken[2])


def test_a_scaler_changes_nothing_but_the_scale(adversarial, monkeypatch):
    """fp16's gradient scaler, on a CPU and in fp32: the same update, clipped after unscaling."""
    plain = adversarial(bottleneck={"weight": 0}, training={"clip_norm": 0.01})
    update(plain)
    before = [p.detach().clone() for p in plain.network.parameters()]
    scaled = adversarial(bottleneck={"weight": 0}, training={"clip_norm": 0.01})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled.accelerator.scaler, scaled.accelerator.native_amp = scaler, True
    monkeypatch.setattr(scaled.accelerator.state, "_mixed_precision", "fp16")
    wrapped = AcceleratedOptimizer(scaled.optimizer.optimizer, scaler=scaler)
    scaled.optimizer, scaled.accelerator._optimizers = wrapped, [wrapped]
    result = update(scaled)
    assert result.terms["gradient_norm"] > 0.01  # it was clipped
    for a, b in zip(before, scaled.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    scaler_before = scaler.get_scale()
    hook = scaled.objective.register_forward_hook(_spoil)
    update(scaled)
    hook.remove()
    assert scaler.get_scale() == scaler_before / 2
    assert scaled.guard.look() == (1, 1)


class _Reads(TorchDispatchMode):
    """Counts how often a number leaves the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_an_update_never_waits_for_the_device(adversarial):
    run = adversarial({"lecam": 0.1, "r1": 1.0, "r1_every": 1})
    update(run)
    with _Reads() as reads:
        torch.ones(()).item()
        assert reads.count == 1
        update(run)
    assert reads.count == 1


@pytest.mark.parametrize("broken", ["autoencoder", "discriminator"])
def test_an_update_without_numbers_moves_nothing(adversarial, broken):
    run = adversarial()
    update(run)
    parts = (run.network, run.rule.discriminator)
    optimizers = (run.optimizer.optimizer, run.discriminator_optimizer)
    before = copy.deepcopy([part.state_dict() for part in parts])
    moments = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in optimizers])
    which = run.objective if broken == "autoencoder" else run.rule
    hook = which.register_forward_hook(_spoil)
    update(run)
    hook.remove()
    assert run.guard.look() == (1, 1)
    for index in range(2):
        now = parts[index].state_dict()
        assert all(torch.equal(now[k], v) for k, v in before[index].items())
        state = optimizers[index].state_dict()["state"]
        assert all(torch.equal(state[0][k], v) for k, v in moments[index][0].items())
    update(run)
    assert run.guard.look() == (0, 1)
    assert not torch.equal(run.network.decoder.conv_out.bias, before[0]["decoder.conv_out.bias"])


def _spoil(module, inputs, output):
    if hasattr(output, "total"):
        output.total = output.total * torch.inf
    else:
        output.discriminator = output.discriminator * torch.nan
        output.autoencoder = output.autoencoder * torch.nan
    return output


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [("channels_last", 1e-5), ("gradient_checkpointing", 1e-5), ("bf16", 2e-2)],
)
def test_one_key_options_give_the_same_loss_and_gradients(adversarial, option, tolerance):
    runs = []

    def measure(**training):
        run = adversarial(
            network={"mid_block_add_attention": True},
            training={"channels_last": False} | training,
        )
        runs.append(run)
        torch.manual_seed(5)
        terms = _accumulate(run, normalize(next(run.stream).images))
        norms = [torch.stack([g.norm() for g in gradients(part)]) for part in _both(run)]
        return terms, norms

    plain, norms = measure()
    changed, others = measure(**{"precision": "bf16"} if option == "bf16" else {option: True})
    last = runs[-1]  # the option is really on
    assert last.network.is_gradient_checkpointing == (option == "gradient_checkpointing")
    weight = last.network.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == (option == "channels_last")
    assert (last.accelerator.mixed_precision == "bf16") == (option == "bf16")
    assert plain.keys() == changed.keys()
    for name in ("total", "l1", "lpips", "d_loss", "adversarial"):
        assert changed[name].item() == pytest.approx(plain[name].item(), rel=tolerance, abs=1e-5)
    for a, b in zip(norms, others, strict=True):
        assert ((a - b).norm() / a.norm()).item() < tolerance * 2


def _both(run):
    return run.autoencoder, run.adversary


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own looking
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # diffusers
def test_compiled_blocks_give_the_same_loss(adversarial):
    def measure(**training):
        run = adversarial(bottleneck={"weight": 0}, training=training)
        terms = [update(run).terms["total"].item() for _ in range(3)]
        compiled = run.network.decoder.mid_block._compiled_call_impl is not None
        assert compiled == training.get("compile", False)
        return terms, list(run.network.state_dict())

    plain, names = measure()
    compiled, same = measure(compile=True, gradient_checkpointing=True)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert same == names  # so that checkpoints go from one to the other
