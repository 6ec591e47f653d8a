"""Result folders such as `latent-ae evaluate` writes, made up around real photographs."""

import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
from conftest import photograph
from PIL import Image

MODES = ("N(0, I)", "N(mean, std²) a channel")


def crops(size, number):
    """Squares of real photographs, all different."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    found = []
    for place in range(number):
        picture = photograph(names[place % 4])
        side = min(picture.size) // (1 if place < 4 else 2)
        step = (place // 4) * 37
        left, top = step % (picture.width - side + 1), (2 * step) % (picture.height - side + 1)
        box = (left, top, left + side, top + side)
        found.append(picture.resize((size, size), Image.Resampling.LANCZOS, box))
    return found


def reconstruction(picture, blur, rng):
    """A picture as a weak autoencoder gives it back."""
    small = [max(2, round(side / blur)) for side in picture.size]
    soft = picture.resize(small, Image.Resampling.LANCZOS).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    noisy = np.asarray(soft, np.float32) + rng.normal(0, 2.0, (*picture.size[::-1], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def psnr(a, b):
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return 10 * math.log10(255**2 / error)


def save(folder, name, picture):
    picture.save(folder / "pictures" / name, lossless=True)
    return f"pictures/{name}"


def make_result(folder, name="tiny", *, blur=2.0, channels=4, size=32, number=6, seed=0):
    """Writes a folder and returns what its evaluation.json says."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True)
    inputs = crops(size, number)
    keys = [f"photo-{place:02d}.jpg" for place in range(number)]
    shown = []
    for place, (key, picture) in enumerate(zip(keys, inputs, strict=True)):
        made = reconstruction(picture, blur, rng)
        shown.append(
            {
                "key": key,
                "input": save(folder, f"input-{place}.webp", picture),
                "reconstruction": save(folder, f"reconstruction-{place}.webp", made),
                "metrics": {
                    "psnr": psnr(picture, made),
                    "lpips": 0.04 * blur + 0.02 * rng.random(),
                },
            }
        )
    thumbnails = [
        save(folder, f"map-{place:03d}.webp", picture.resize((48, 48)))
        for place, picture in enumerate(inputs)
    ]
    content = {
        "format": 1,
        "name": name,
        "date": "2026-11-25",
        "versions": {"latent_ae": "0.1.0", "torch": "2.9.0"},
        "machine": "2 cores x86_64",
        "seconds": {"all": 31.2, "model": 25.0},
        "protocol": {"name": "photos256", "lpips": ["alex"], "frechet": "alexnet"},
        "data": {
            "path": "data/val",
            "images": 100,
            "pixels_sha256": "0f" * 32,
            "skipped": [],
            "not_finite": [],
        },
        "model": {
            "path": f"exported/{name}",
            "class_name": "AutoencoderKL",
            "weights_sha256": f"{seed:02d}ab" * 16,
            "downsampling": 8,
            "latent_channels": channels,
            "encoder_parameters": 34_163_592,
            "decoder_parameters": 49_490_179,
            "values_per_image": 1024.0 * channels,
            "bits_per_image": 29_871.5 * channels,
            "scaling_factor": 0.18215,
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
        },
        **_metrics(shown, blur, channels),
        "latents": _latents(channels, rng),
        "probes": _probes(keys, blur, rng),
        "precision": _precision(blur),
        "pictures": {
            "shown": shown,
            "worst": sorted(shown, key=lambda one: -one["metrics"]["lpips"])[:3],
            "prior": [
                {
                    "title": title,
                    "files": [
                        save(folder, f"prior-{row}-{i}.webp", _noise(size, rng)) for i in range(4)
                    ],
                }
                for row, title in enumerate(MODES)
            ],
            "interpolations": [
                {
                    "keys": keys[:2],
                    "files": [
                        save(folder, f"between-{i}.webp", Image.blend(inputs[0], inputs[1], i / 6))
                        for i in range(7)
                    ],
                }
            ],
            "map": thumbnails,
        },
    }
    write(folder, content)
    _table(folder, content["metrics"], rng)
    return content


def write(folder, content):
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def _noise(size, rng):
    low = rng.integers(0, 256, (max(2, size // 8),) * 2 + (3,), np.uint8)
    return Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC)


def _metrics(shown, blur, channels):
    mean = float(np.mean([one["metrics"]["psnr"] for one in shown]))
    metrics = {
        "psnr": mean,
        "ssim": 0.97 - 0.07 * blur,
        "ms_ssim": 0.995 - 0.02 * blur,
        "lpips": 0.01234 + 0.04 * blur,
    }

    def around(values):
        return {name: [0.98 * value, 1.02 * value] for name, value in values.items()}

    def reference(name, detail, worse, bits, **more):
        values = {
            "psnr": metrics["psnr"] - worse,
            "ssim": metrics["ssim"] - 0.03 * worse,
            "ms_ssim": metrics["ms_ssim"] - 0.01 * worse,
            "lpips": metrics["lpips"] + 0.09 * worse,
        }
        return {
            "name": name,
            "detail": detail,
            "metrics": values,
            "intervals": around(values),
            "frechet": 3.217 + worse,
            "bits_per_image": bits,
            **more,
        }

    bits = 29_000.0 * channels
    return {
        "metrics": metrics,
        "intervals": around(metrics),
        "frechet": {
            "network": "alexnet",
            "distance": 0.6172 * blur,
            "features": 256,
            "images": 100,
            "note": "100 pictures for 256 features: biased, compare only with itself.",
        },
        "references": [
            reference("Lanczos", "as many values", 2.1, None),
            reference("JPEG", "at most as many bits", 1.2, bits, too_small=3),
            reference("WebP", "at most as many bits", 0.4, bits + 11),
        ],
    }


def _latents(channels, rng):
    frequency = np.geomspace(1 / 128, 0.5, 24)
    rows = []
    for place in range(channels):
        dead = place == channels - 1 and channels > 4
        spread = 0.02 if dead else 4.5 + rng.random()
        rows.append(
            {
                "mean": rng.normal(0, 0.4),
                "std": spread,
                "kl_nats": 0.002 if dead else 3.9 + rng.random(),
                "posterior_std": [0.98, 0.99, 1.0] if dead else [0.004, 0.021, 0.052],
                "signal_share": 0.003 if dead else 0.99,
                "active_units": 0.0 if dead else 1.0,
                "saturated": 0.12 if place == 1 and channels > 4 else 0.0,
                "largest": 4 * spread,
                "prior_kl": 0.02 + 0.1 * rng.random(),
                "decoder_effect": 0.01 if dead else 11 + 20 * rng.random(),
                "dead": dead,
            }
        )
    latents, pictures = frequency**-1.1, frequency**-2.1
    return {
        "images": 100,
        "mean": 0.113,
        "std": 4.93,
        "kl_nats_per_image": 17_301.0,
        "kl_bits_per_value": 6.09,
        "active_units": 0.98,
        "channels": rows,
        "aggregate": {
            "prior_kl": 0.05,
            "sliced_wasserstein": 3.91,
            "sliced_wasserstein_patch": 4.17,
            "floor": 0.0121,
            "floor_patch": 0.0234,
            "scaled_sliced_wasserstein": 0.117,
            "scaled_sliced_wasserstein_patch": 0.391,
        },
        "spectrum": {
            "frequency": frequency.tolist(),
            "latents": (latents * np.exp(rng.normal(0, 0.08, 24)) / latents.mean()).tolist(),
            "pictures": (pictures / pictures.mean()).tolist(),
            "high_share": 0.213,
            "pictures_high_share": 0.047,
            "slope": -1.13,
            "pictures_slope": -2.08,
        },
    }


def _probes(keys, blur, rng):
    transforms = ("scale 1/2", "rotate 90°", "mirror", "shift 4 px")
    noise = (0.0, 0.03, 0.1, 0.2, 0.3, 0.5)
    return {
        "images": len(keys),
        "equivariance": [
            {"transform": one, "latents": 0.1 * blur + 0.1 * rng.random(), "psnr": 30 - 3 * blur}
            for one in transforms
        ],
        "sensitivity": [
            {"noise": one, "psnr": 34 - 2.5 * blur - 9 * one**0.8 * (1 + 0.2 * blur)}
            for one in noise
        ],
        "map": {
            "keys": keys,
            "points": rng.normal(0, 2, (len(keys), 2)).tolist(),
            "variance": [0.31, 0.12],
        },
    }


def _precision(blur):
    names = ["encoder.conv_in", *(f"encoder.down.{i}" for i in range(12)), "decoder.conv_in"]
    names += [*(f"decoder.up.{i}" for i in range(14)), "decoder.conv_out"]
    largest = [3 + 5 * i + math.exp(i / 2.9 * blur / 2) for i in range(len(names) - 1)] + [1.2]
    fits = max(largest) < 65504
    return {
        "largest_activation": max(largest),
        "largest_layer": names[largest.index(max(largest))],
        "layers": [{"name": n, "largest": v} for n, v in zip(names, largest, strict=True)],
        "fp16": {
            "finite": fits,
            "psnr": 72.1 if fits else None,
            "largest_error": 0.0041 if fits else None,
        },
        "bf16": {"finite": True, "psnr": 51.3, "largest_error": 0.052},
        "force_upcast": not fits,
        "reason": "activations stay below 1.2e+04, and fp16 changes the output by 72.1 dB"
        if fits
        else "decoder.up.13 reaches 2.95e+06, beyond the largest number of fp16, 65504",
    }


def _table(folder, means, rng, rows=100):
    columns = {
        "key": [f"photo-{place:02d}.jpg" for place in range(rows)],
        "width": [512] * rows,
        "height": [384] * rows,
        "finite": [True] * rows,
        "kl_nats": rng.normal(17_301, 900, rows).tolist(),
        "pixels": ["ab" * 8] * rows,
        "psnr": rng.normal(means["psnr"], 2.8, rows).tolist(),
    }
    for name in ("ssim", "ms_ssim", "lpips"):
        columns[name] = (means[name] * np.exp(rng.normal(0, 0.3, rows))).tolist()
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "per_image.parquet")
