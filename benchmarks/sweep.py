"""Which of timm's architectures keep which laws: every family at every kind of layer they have.

    python benchmarks/sweep.py --sample     the fixed 40 models, about 5 minutes on one core
    python benchmarks/sweep.py --all        CNNs up to 10 M parameters and others: about 40 minutes

Random weights, no network. Finished models are kept in scratch/sweep.jsonl, so a run that was cut
off goes on; a change of the core or of timm starts anew. Both write docs/support.md.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread a process

import argparse
import copy
import hashlib
import importlib.metadata
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.core.adapters import Family
from onetrunk.core.attach import attach, build
from onetrunk.core.domain import delta, domain_of
from onetrunk.core.merge import difference, merge
from onetrunk.core.trace import timm_classifier, trace
from onetrunk.core.tree import is_norm

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "scratch" / "sweep.jsonl"
TABLE = ROOT / "docs" / "support.md"
MAX_PARAMETERS = 10_000_000
CLASSES = [f"class{c}" for c in range(32)]  # many logits: their rounding is measured by the largest
EVERYWHERE = ot.Where(layers="all")
EXACT = 1e-10  # of the largest logit: what merging may change in float64

TRIED: dict[str, tuple[Family | None, ot.Where | None]] = {
    "series": (ot.Series(), EVERYWHERE),
    "parallel": (ot.Parallel(), EVERYWHERE),
    "lowrank(rank=4)": (ot.LowRank(rank=4), EVERYWHERE),
    "channelwise": (ot.Channelwise(), EVERYWHERE),
    "norm": (ot.Norm(), None),
    "head": (ot.Head(), None),
    "full": (ot.Full(), None),
    "default": (None, None),
}

SAMPLE = (
    "convnext_atto", "convnextv2_atto", "crossvit_tiny_240", "deit_tiny_distilled_patch16_224",
    "densenet121", "dla46_c", "edgenext_xx_small", "efficientformerv2_s0", "efficientnet_b0",
    "efficientvim_m1", "ese_vovnet19b_slim_dw", "fastvit_t8", "gernet_s", "ghostnet_050",
    "hgnetv2_b0", "inception_next_atto", "lcnet_050", "levit_128s", "mixnet_s",
    "mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_050",
    "mobilevit_xxs", "mobilevitv2_050", "nf_regnet_b0", "pit_ti_224", "regnetx_002",
    "regnety_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "resnet10t", "rexnet_100",
    "shvit_s1", "starnet_s1", "tf_efficientnet_lite0", "tiny_vit_5m_224", "visformer_tiny",
    "xcit_nano_12_p16_224",
)  # fmt: skip

BESIDE_THE_CNNS = (
    "beit_base_patch16_224", "coat_lite_tiny", "convnext_tiny", "crossvit_tiny_240",
    "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eca_nfnet_l0",
    "efficientformer_l1", "efficientformerv2_s0", "eva02_tiny_patch14_224", "levit_128s",
    "maxvit_tiny_tf_224", "mobilevit_s", "mvitv2_tiny", "nf_resnet26", "pit_ti_224",
    "poolformer_s12", "pvt_v2_b0", "resnet18", "resnet50", "resnetv2_50", "resnetv2_50x1_bit",
    "resnext50_32x4d", "seresnet50", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "tf_efficientnet_cc_b0_4e", "tiny_vit_5m_224", "twins_pcpvt_small", "vgg11_bn",
    "vit_base_patch16_224", "vit_tiny_patch16_224", "volo_d1_224", "xcit_nano_12_p16_224",
)  # fmt: skip


# One model


def backbone_and_images(name: str) -> tuple[nn.Module, Tensor]:
    """A frozen network and two images: of 64 pixels, or of its own size where it takes no other."""
    problem = ""
    for options, side in (({"img_size": 64}, 64), ({}, 64), ({}, None)):
        try:
            net = _lively(name, options)
            own = tuple(net.pretrained_cfg["input_size"])
            size = own if side is None else (own[0], side, side)
            x_bihw = torch.randn((2, *size), generator=torch.Generator().manual_seed(1))
            if torch.isfinite(net(x_bihw)).all():
                return net, x_bihw
            problem = "its logits are not finite"
        except Exception as error:  # the next size may run
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    raise RuntimeError(problem)


@torch.no_grad()
def _lively(name: str, options: dict[str, int]) -> nn.Module:
    """A frozen network of random numbers: no neutral norms, no vanishing branches.

    Norms inside the classifier stay neutral: a fresh domain has fresh ones there (LeViT).
    """
    torch.manual_seed(0)
    net = timm.create_model(name, **options).eval().requires_grad_(False)
    heads = {path.rpartition(".")[0] or "-" for path in timm_classifier(net)}
    for path, module in net.named_modules():
        if is_norm(module) and path.rpartition(".")[0] not in heads:
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers()]:
                positive = key.endswith(("weight", "running_var"))
                if tensor.is_floating_point():
                    tensor.uniform_(0.7, 1.3) if positive else tensor.normal_(0.0, 0.1)
    for key, parameter in net.named_parameters():
        tiny = parameter.is_floating_point() and float(parameter.abs().max()) < 0.01
        if tiny and not key.endswith("bias"):  # layer scales start at 1e-6, skip gains at 0
            parameter.uniform_(0.2, 0.4)
    return net


def check(name: str, tried: Iterable[str] = tuple(TRIED)) -> dict[str, Any]:
    """What one model showed: a JSON value with a result for every family tried."""
    start = time.process_time()
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": name}
    try:
        net, x_bihw = backbone_and_images(name)
        traced = trace(net, tuple(x_bihw.shape[1:]))
        row |= {
            "module": type(net).__module__.rpartition(".")[2],
            "parameters": sum(p.numel() for p in net.parameters()),
            "size_px": x_bihw.shape[-1],
            "sites": len(traced.sites),
            "skipped": dict(traced.skipped),
            "families": {key: _family(net, x_bihw, *TRIED[key]) for key in tried},
            "isolated": _isolated(net, x_bihw),
        }
    except Exception as error:  # a sweep reports and goes on
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row | {"seconds": round(time.process_time() - start, 1)}


def _family(
    net: nn.Module, x_bihw: Tensor, family: Family | None, where: ot.Where | None
) -> dict[str, Any]:
    size = tuple(x_bihw.shape[1:])
    try:
        model = attach(net, family, CLASSES, where=where, input_size=size).eval()
        found: dict[str, Any] = {"family": domain_of(model).family, "n": len(domain_of(model).plan)}
        found["identity"] = _same_into_the_head(net, model, x_bihw)
        before = fingerprint(net)
        found["without_gradient"] = _step(model, x_bihw)
        found["backbone_unchanged"] = fingerprint(net) == before
        found["reloaded"] = _reloads(model, x_bihw)
        _shake(model)
        found |= difference(model, merge(model), x_bihw)
        found["exact"] = _difference_in_float64(model, x_bihw)
        found["mixed"] = _mixed(net, model, x_bihw)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return found


@torch.no_grad()
def _same_into_the_head(net: nn.Module, model: nn.Module, x_bihw: Tensor) -> float:
    """The largest difference between what enters the classifier of one and of the other; 0 is law.

    Full is compared with a backbone whose weights want gradients too: torch may take another
    matrix product for those.
    """
    whole = domain_of(model).scope == "everything"
    net.requires_grad_(whole)
    left = tuple(path for path in domain_of(model).head if path in dict(model.named_modules()))
    theirs, ours = (_into_head(n, left, x_bihw) for n in (net, model))
    net.requires_grad_(False)
    assert len(theirs) == len(ours) > 0, "the classifier is not called"
    off = [float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True)]
    bits = all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    return 0.0 if bits else max(*off, torch.finfo(torch.float32).tiny)


def _into_head(net: nn.Module, head: tuple[str, ...], x_bihw: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for name in head
    ]
    net(x_bihw)
    for hook in hooks:
        hook.remove()
    return seen


def _step(model: nn.Module, x_bihw: Tensor) -> list[str]:
    """One SGD step in train mode; the adapters' parameters that it did not reach."""
    model.train()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(own.values(), lr=1e-3)
    nn.functional.cross_entropy(model(x_bihw), torch.arange(len(x_bihw)) % 3).backward()
    frozen = [
        name for name, p in model.named_parameters() if p.grad is not None and name not in own
    ]
    assert not frozen, f"{frozen[0]} is frozen and got a gradient"
    # two images alike make a batch norm in the head (LeViT) multiply gradients by thousands
    torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
    optimizer.step()
    model.eval()
    return [name for name, p in own.items() if p.grad is None and ".adapter." in name]


@torch.no_grad()
def _reloads(model: nn.Module, x_bihw: Tensor) -> bool:
    """Whether the record and the delta alone give the same logits, bit for bit."""
    domain = domain_of(model)
    facts = {
        key: getattr(domain, key)
        for key in ("scope", "family", "plan", "skipped", "classes", "head", "head_features")
    }
    again = build(domain.backbone, **facts, preprocessing=domain.preprocessing, seed=9).eval()
    again.load_state_dict({n: t.clone() for n, t in delta(model).items()}, strict=False)
    return torch.equal(again(x_bihw), model(x_bihw))


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Moves the domain's own numbers by about a tenth of their size, as training would."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in delta(model).items():
        if tensor.is_floating_point() and not name.endswith("running_var"):
            size = float(tensor.std()) if tensor.numel() > 1 else 0.1
            scale = 0.1 * min(max(size, 0.01), 1.0)
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


@torch.no_grad()
def _difference_in_float64(model: nn.Module, x_bihw: Tensor) -> float:
    """What merging changes where rounding hides nothing, relative to the largest logit."""
    double, x_bihw = copy.deepcopy(model).double(), x_bihw.double()
    y = double(x_bihw)
    return float((merge(double)(x_bihw) - y).abs().max() / y.abs().max())


@torch.no_grad()
def _mixed(net: nn.Module, model: nn.Module, x_bihw: Tensor) -> float | str | None:
    """What mixing with a domain of norms alone changes in float64; why where it is refused.

    None for `full`, which shares no forward.
    """
    if domain_of(model).scope == "everything":
        return None
    other = attach(net, ot.Norm(), CLASSES[:5], input_size=tuple(x_bihw.shape[1:]), seed=3).eval()
    _shake(other)
    models = {"one": copy.deepcopy(model).double(), "two": copy.deepcopy(other).double()}
    images, rows = x_bihw.double().repeat(2, 1, 1, 1)[:3], ("one", "two", "one")
    try:
        found = ot.mix(models)(images, rows)
    except ot.OnetrunkError as error:
        return str(error)
    expected = [models[name](images)[k] for k, name in enumerate(rows)]
    off = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(max(off))


@torch.no_grad()
def _isolated(net: nn.Module, x_bihw: Tensor) -> bool:
    """Whether training one of three domains leaves the others' bits and logits as they were."""
    size = tuple(x_bihw.shape[1:])
    models = [attach(net, None, CLASSES, input_size=size, seed=s).eval() for s in range(3)]
    before = [(m(x_bihw), {n: t.clone() for n, t in delta(m).items()}) for m in models[1:]]
    with torch.enable_grad():
        _step(models[0], x_bihw)
    return all(
        torch.equal(model(x_bihw), logits)
        and all(torch.equal(t, stored[n]) for n, t in delta(model).items())
        for model, (logits, stored) in zip(models[1:], before, strict=True)
    )


def problems(row: dict[str, Any]) -> list[str]:
    """What of the laws a model did not keep; empty where it kept all."""
    if "error" in row:
        return [row["error"]]
    found = [] if row["isolated"] else ["domains are not isolated"]
    for key, result in row["families"].items():
        if "error" in result:
            found.append(f"{key}: {result['error']}")
            continue
        if result["identity"]:
            found.append(f"{key}: fresh features differ by {result['identity']:.1e}")
        if not result["exact"] <= EXACT:
            found.append(f"{key}: merging differs by {result['exact']:.1e} in float64")
        mixed = result["mixed"]
        if isinstance(mixed, float) and not mixed <= EXACT:
            found.append(f"{key}: mixing differs by {mixed:.1e} in float64")
        if result["without_gradient"]:
            n, first = len(result["without_gradient"]), result["without_gradient"][0]
            found.append(f"{key}: {n} adapter tensors get no gradient ({first})")
        found += [
            f"{key}: not {law}" for law in ("backbone_unchanged", "reloaded") if not result[law]
        ]
    return found


def remarks(row: dict[str, Any]) -> list[str]:
    """What a user of a model should know although every law is kept."""
    refused = {
        key: result
        for key, result in row.get("families", {}).items()
        if "error" not in result and not result["difference"] <= result["limit"]
    }
    return [
        f"{key} differs by {result['difference']:.0e} in float32 (the network's own rounding: "
        f"{result['noise']:.0e}), so merge(check=) refuses it"
        for key, result in refused.items()
    ]


# Many models


def cnns() -> list[str]:
    """timm's CNNs up to 10 M parameters: four convolutions with k >= 3 and four norms at least."""
    kept, found = CACHE.with_name(f"sweep_cnns_{timm.__version__}.json"), []
    if kept.exists():
        return list(json.loads(kept.read_text()))
    names = timm.list_models(exclude_filters="test_*")
    for done, name in enumerate(names, 1):
        print(f"\rreading {done}/{len(names)} {name:<50}", end="", flush=True)
        try:
            with torch.device("meta"):
                net = timm.create_model(name)
        except Exception:  # one that cannot be made on meta is made nowhere in this list
            continue
        modules = list(net.modules())
        spatial = sum(isinstance(m, nn.Conv2d) and max(m.kernel_size) >= 3 for m in modules)
        norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
        if sum(p.numel() for p in net.parameters()) <= MAX_PARAMETERS and min(spatial, norms) >= 4:
            found.append(name)
    print()
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def state() -> str:
    """A digest of what results depend on: the core's source and the libraries' versions."""
    digest = hashlib.sha256(f"{torch.__version__} {timm.__version__}".encode())
    for path in [Path(__file__), *sorted((ROOT / "src/onetrunk/core").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(names: list[str], workers: int) -> list[dict[str, Any]]:
    """The row of every model, from the cache where it is of this state."""
    of_now = state()
    rows = {row["model"]: row for row in _cached() if row["state"] == of_now}
    todo, start = [name for name in names if name not in rows], time.perf_counter()
    context = multiprocessing.get_context("spawn")
    CACHE.parent.mkdir(exist_ok=True)
    # a fresh process now and then: what a model leaves in memory goes with it
    with context.Pool(workers, maxtasksperchild=20) as pool, CACHE.open("a") as log:
        for done, row in enumerate(pool.imap_unordered(check, todo), 1):
            row["state"] = of_now
            rows[row["model"]] = row
            log.write(json.dumps(row) + "\n")
            log.flush()
            left = (time.perf_counter() - start) / done * (len(todo) - done)
            told = "; ".join(problems(row)) or "all laws kept"
            print(
                f"{done}/{len(todo)} {row['model']} {row['seconds']} s: {told} ({left:.0f} s left)",
                flush=True,
            )
    return [rows[name] for name in names]


def _cached() -> Iterator[dict[str, Any]]:
    if CACHE.exists():
        yield from map(json.loads, CACHE.read_text().splitlines())


def table(rows: list[dict[str, Any]], command: str) -> str:
    """The support table as Markdown: a row for each of timm's architecture files."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("module", "not built"), []).append(row)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "timm"))
    kept = sum(not problems(row) for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    lines = [
        "# Which architectures are supported",
        "",
        f"Generated by `{command}` ({versions}, {seconds:.0f} s on one core); do not edit.",
        "",
        f"{len(rows)} models with random weights; {kept} keep every law with every family: a fresh "
        "domain computes the backbone's features bit for bit, one training step reaches every "
        "adapter and nothing frozen, three domains are isolated, record and delta alone give the "
        "same logits, and merging is exact (within 1e-10 of the largest logit in float64).",
        "",
        "*Sites* are the layers that may be adapted; *other* counts layers and parameters that "
        "hold numbers and cannot be (they stay the backbone's). *Merging* is the largest "
        "float32 difference over models and families, relative to the largest logit; beyond 4 "
        "times the network's own rounding, or 1e-4, there is a note.",
        "",
        "| timm file | models | sites | other | families that apply | merging | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(module, group) for module, group in sorted(groups.items())]
    lines += ["", "## Why layers have no adapter", "", *_reasons(rows)]
    return "\n".join(lines) + "\n"


def _line(module: str, group: list[dict[str, Any]]) -> str:
    built = [row for row in group if "error" not in row]
    sites = _range(row["sites"] for row in built)
    other = _range(len(row["skipped"]) for row in built)
    applies = [k for k in TRIED if built and all("error" not in r["families"][k] for r in built)]
    families = "all" if len(applies) == len(TRIED) else ", ".join(applies) or "none"
    worst = [r["difference"] for row in built for r in row["families"].values() if "error" not in r]
    merging = f"{max(worst):.0e}" if worst else ""
    told = {row["model"]: [*problems(row), *remarks(row)] for row in group}
    notes = "; ".join(f"{model}: {', '.join(facts)}" for model, facts in told.items() if facts)
    return f"| {module} | {len(group)} | {sites} | {other} | {families} | {merging} | {notes} |"


def _range(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    if not found:
        return ""
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}-{found[-1]}"


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Each reason with how many layers and models it holds for, the most frequent first."""
    met: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.get("skipped", {}).values():
            met.setdefault(reason, []).append(row["model"])
    ordered = sorted(met.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        f"- {reason}: {len(models)} in {len(set(models))} models, e.g. {models[0]}"
        for reason, models in ordered
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every model")
    which.add_argument("--sample", action="store_true", help="the fixed 40 models")
    which.add_argument("--models", nargs="+", metavar="NAME", help="these models")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    asked = parser.parse_args()
    every = asked.all and sorted({*cnns(), *BESIDE_THE_CNNS})
    names = asked.models or every or list(SAMPLE)
    start = time.perf_counter()
    rows = run(names, asked.workers)
    text = table(rows, "python benchmarks/sweep.py " + ("--all" if asked.all else "--sample"))
    print(text)
    if not asked.models:
        TABLE.write_text(text)
    failed = [row["model"] for row in rows if problems(row)]
    print(
        f"{len(rows)} models, {time.perf_counter() - start:.0f} s; not all laws: {failed or 'none'}"
    )


if __name__ == "__main__":
    main()
