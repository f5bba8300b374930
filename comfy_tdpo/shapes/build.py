"""Build the world of Shapes from scratch: `python -m comfy_tdpo.shapes.build`.

The build renders captioned scenes, trains an autoencoder, three encoders with their rewards, a U-Net, a flow model and
a tiny decoder on them, and writes the world's folder: a diffusers pipeline, the flow model, the encoders, the decoder,
and a README with measurements. Every batch is drawn from (seed, stage, step), and each stage saves its state regularly,
so a stopped build continues where it left off. `--only STAGE` trains one encoder, the flow model or the tiny decoder
anew in a world that is complete otherwise, and leaves everything else as it is.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizerFast

from ..interrupts import keyboard_interrupts
from ..models.components import Components, load_components
from ..models.kind import FLOW_OF_SHAPES
from ..models.stable_diffusion import Autoencoder
from ..models.tiny_decoder import new_tiny_decoder, original_weights
from . import WORLD
from .dataset import make_scenes, preference
from .encoders import ClipEncoder, JudgeEncoder, MatchEncoder, PreferenceHead, clip_config, load_tokenizer, tokenize
from .matching import Matching
from .networks import NORM_GROUPS, new_scheduler, new_text_encoder, new_transformer, new_unet
from .report import write_report
from .scenes import IMAGE_SIZE
from .tokenizer import build_tokenizer

TRAINING_SCENES = 32_000
DECODED = 1024  # of these, for the tiny decoder: each has a whole image of targets
TINY_DECODER = 24, (3, 3, 2, 0)  # width, and blocks at 8, 16, 32 and 64 pixels: a quarter of the full decoder's time

# Stage -> (steps, batch size).
STAGES = {
    "vae": (6000, 16),
    "clip": (1800, 128),
    "unet": (3400, 64),
    "flow": (6800, 64),
    "judge": (1500, 128),
    "match": (1200, 128),
    "decoder": (1000, 16),
}
ALONE = ("clip", "flow", "judge", "match", "decoder")  # stages that no other stage needs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 built, 1 failed, 2 wrong input, 130 stopped by the user."""
    parser = argparse.ArgumentParser(prog="python -m comfy_tdpo.shapes.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=WORLD, help="folder to write the world to")
    parser.add_argument(
        "--work", type=Path, default=Path("shapes-build"), help="folder for the state of unfinished stages"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument(
        "--quick", action="store_true", help="train each stage for only 3 steps, to test that the build runs"
    )
    parser.add_argument(
        "--only", choices=ALONE, help="train only this part, for the complete world in --out, and measure it"
    )
    args = parser.parse_args(argv)
    try:
        with keyboard_interrupts():
            build(args.out, args.work, args.seed, steps=3 if args.quick else None, only=args.only)
    except KeyboardInterrupt:
        print(f"\nStopped. Run the same command again to continue from the state in {args.work}.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"comfy_tdpo.shapes.build: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def build(out: Path, work: Path, seed: int, steps: int | None = None, only: str | None = None) -> None:
    """Train every stage that is not finished in `work`, or the part `only`, and write the world to `out`.

    Raises:
        ValueError: `work` belongs to a build with other settings, or `out` has no world for the part `only`.
    """
    if only and not (out / "pipeline" / "model_index.json").exists():
        raise ValueError(
            f"{out} holds no world; --only {only} adds to one: give its folder as --out, or build it first"
        )
    _claim(work, {"seed": seed, "steps": steps})
    world = Builder(out, work, seed, steps)
    if only:
        getattr(world, only)(load_tokenizer(out))
    else:
        tokenizer = build_tokenizer(out / "pipeline" / "tokenizer")
        vae = world.vae()
        world.clip(tokenizer)
        world.unet(tokenizer, vae)
        world.flow(tokenizer)
        world.judge(tokenizer)
        world.match(tokenizer)
        world.decoder(tokenizer)
    write_report(out)


def _claim(work: Path, settings: dict[str, int | None]) -> None:
    """Mark `work` as the folder of a build with `settings`; another build's stages cannot be continued."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work / "build.json"
    if mark.exists() and (found := json.loads(mark.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{work} holds a build with {found}; expected {settings}: choose another --work")
    mark.write_text(json.dumps(settings), encoding="utf-8")


class Builder:
    """The stages of a build, each of which trains a network with its own loss."""

    def __init__(self, out: Path, work: Path, seed: int, steps: int | None):
        self.out, self.work, self.seed, self.steps = out, work, seed, steps
        count = TRAINING_SCENES if steps is None else 256
        self.captions, self.scenes, self.images = make_scenes(seed, count)

    def vae(self) -> AutoencoderKL:
        """A KL autoencoder, 64 x 64 x 3 to 8 x 8 x 4: L1 reconstruction and a small KL term towards N(0, 1)."""
        torch.manual_seed(self.seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 128),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=NORM_GROUPS,
            sample_size=IMAGE_SIZE,
        ).to(memory_format=torch.channels_last)
        nn.init.constant_(vae.quant_conv.bias[4:], -4)  # start with little posterior noise, log variance -4

        def loss(vae: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
            images = (self.images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
            kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
            return F.l1_loss(decoded, images) + 1e-4 * kl.mean()

        vae = self._train("vae", vae, loss, lr=1e-3)
        latents = self._encode(vae, rows=torch.arange(min(2048, len(self.images))))
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        return vae

    def clip(self, tokenizer: CLIPTokenizerFast) -> None:
        """Encoder A, trained contrastively on captions, together with its preference head, fitted to noisy ratings."""
        torch.manual_seed(self.seed + 1)
        network = nn.ModuleDict(
            {
                "encoder": ClipEncoder(CLIPModel(clip_config(len(tokenizer), tokenizer.eos_token_id))),
                "head": PreferenceHead(),
            }
        )
        tokens = tokenize(tokenizer, self.captions)
        ratings = torch.tensor([preference(scene) for scene in self.scenes])

        def loss(network: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
            images = _add_noise(self.images[rows].float() / 255, 0.2, generator)
            image_embeds = network["encoder"].embed_images(images)
            text_embeds = network["encoder"].embed_tokens(tokens[rows])
            rated = ratings[rows] + torch.randn(len(rows), generator=generator)
            scale = network["encoder"].clip.logit_scale
            return contrastive(image_embeds, text_embeds, scale) + 0.2 * F.mse_loss(
                network["head"](image_embeds), rated
            )

        network = self._train("clip", network, loss, lr=1e-3)
        network["encoder"].clip.save_pretrained(self.out / "clip")
        tokenizer.save_pretrained(self.out / "clip")
        save_file(network["head"].state_dict(), self.out / "clip" / "preference_head.safetensors")

    def judge(self, tokenizer: CLIPTokenizerFast) -> None:
        """Encoder B, trained on separate scenes that look badly photographed: blurred, tinted, noisy."""
        torch.manual_seed(self.seed + 2)
        captions, _, pictures = make_scenes(self.seed + 1_000_003, len(self.images))
        tokens = tokenize(tokenizer, captions)
        judge = JudgeEncoder(len(tokenizer))

        def loss(judge: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
            images = pictures[rows].float() / 255
            gain = 1 + 0.2 * (torch.rand(len(rows), 3, 1, 1, generator=generator) - 0.5)
            blur = torch.rand(len(rows), 1, 1, 1, generator=generator)
            images = torch.lerp(images, F.avg_pool2d(images, 3, stride=1, padding=1), blur)
            images = _add_noise((images * gain).clamp(0, 1), 0.1, generator)
            return contrastive(judge.embed_images(images), judge.embed_tokens(tokens[rows]), judge.logit_scale)

        judge = self._train("judge", judge, loss, lr=1e-3)
        (self.out / "judge").mkdir(parents=True, exist_ok=True)
        save_file(judge.state_dict(), self.out / "judge" / "model.safetensors")

    def match(self, tokenizer: CLIPTokenizerFast) -> None:
        """The encoder of shapes-match, trained on scenes of its own (matching.py) and saved in float16."""
        torch.manual_seed(self.seed + 4)
        matching = Matching(self.seed + 2_000_003, len(self.images), tokenizer)
        match = MatchEncoder(len(tokenizer)).to(memory_format=torch.channels_last)
        # The loss still falls when the schedule ends, so the average, which is 500 steps long, lags behind.
        match = self._train("match", match, matching.loss, lr=1e-3, averaged=False)
        (self.out / "match").mkdir(parents=True, exist_ok=True)
        weights = {name: weight.half().contiguous() for name, weight in match.state_dict().items()}
        save_file(weights, self.out / "match" / "model.safetensors")

    def unet(self, tokenizer: CLIPTokenizerFast, vae: AutoencoderKL) -> None:
        """A latent U-Net and its text encoder, which predict noise; 10 % of captions are dropped for guidance."""
        torch.manual_seed(self.seed + 3)
        network = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokenizer)})
        latents = self._encode(vae, torch.arange(len(self.images))) * vae.config.scaling_factor
        tokens, empty = tokenize(tokenizer, self.captions), tokenize(tokenizer, [""])[0]
        scheduler = new_scheduler()

        def loss(network: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
            clean, ids = latents[rows], tokens[rows].clone()
            ids[torch.rand(len(rows), generator=generator) < 0.1] = empty
            noise = torch.randn(clean.shape, generator=generator)
            timesteps = torch.randint(1000, (len(rows),), generator=generator)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            states = network["text"](input_ids=ids).last_hidden_state
            return F.mse_loss(network["unet"](noisy, timesteps, states).sample.float(), noise)

        network = self._train("unet", network, loss, lr=1e-3)
        self._save_pipeline(network, tokenizer, vae, scheduler)

    def flow(self, tokenizer: CLIPTokenizerFast) -> None:
        """A rectified flow (Esser et al., 2024) over the latents and text states of the finished pipeline.

        The times of its loss are logit-normal; 10 % of captions are dropped for guidance.
        """
        torch.manual_seed(self.seed + 5)
        parts = load_components(str(self.out / "pipeline"))
        latents = self._encode(parts.vae, torch.arange(len(self.images))) * parts.vae.config.scaling_factor
        tokens, empty = tokenize(tokenizer, self.captions), tokenize(tokenizer, [""])[0]

        def loss(transformer: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
            clean, ids = latents[rows], tokens[rows].clone()
            ids[torch.rand(len(rows), generator=generator) < 0.1] = empty
            noise = torch.randn(clean.shape, generator=generator)
            time = torch.randn(len(rows), generator=generator).sigmoid()
            noisy = torch.lerp(clean, noise, time.view(-1, 1, 1, 1))
            text = parts.text_encoder(input_ids=ids)
            flow = transformer(noisy, text.last_hidden_state, text.pooler_output, 1000 * time).sample
            return F.mse_loss(flow, noise - clean)

        transformer = self._train("flow", new_transformer(), loss, lr=1e-3, cycles=2)
        self._save_flow(transformer)

    def decoder(self, tokenizer: CLIPTokenizerFast) -> None:
        """A tiny decoder, which learns from the autoencoder's own: L1 on the images of latents of all noise levels.

        Those are what a critic reads: a third noisy latents of the U-Net, a third the clean latents that it predicts
        from such, and a third noisy latents of the flow model.
        """
        torch.manual_seed(self.seed + 6)
        parts = load_components(str(self.out / "pipeline"))
        rows = torch.arange(min(DECODED, len(self.images)))
        latents = self._latents_read(parts, rows, tokenize(tokenizer, [self.captions[row] for row in rows.tolist()]))
        decode = Autoencoder(parts.vae)
        with torch.no_grad():
            targets = torch.cat([decode(part) for part in tqdm(latents.split(64), desc="decoded", leave=False)])

        def loss(network: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
            return F.l1_loss(network(latents[rows]) / 2 + 0.5, targets[rows])

        network = new_tiny_decoder(latents.shape[1], *TINY_DECODER)
        network = self._train("decoder", network, loss, lr=2e-3, averaged=False, count=len(latents))
        (self.out / "decoder").mkdir(parents=True, exist_ok=True)
        weights = {name: weight.half().contiguous() for name, weight in original_weights(network).items()}
        save_file(weights, self.out / "decoder" / "model.safetensors")

    @torch.no_grad()
    def _latents_read(self, parts: Components, rows: Tensor, tokens: Tensor) -> Tensor:
        """Scaled latents of the images in `rows`, each as one of three kinds, at a level of noise that is drawn."""
        generator = torch.Generator().manual_seed(_seed(self.seed, "latents", len(rows)))
        clean = self._encode(parts.vae, rows) * parts.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (len(rows),), generator=generator)
        noisy = parts.scheduler.add_noise(clean, noise, timesteps)
        states = parts.text_encoder(input_ids=tokens).last_hidden_state
        batches = zip(noisy.split(64), timesteps.split(64), states.split(64), strict=True)
        outputs = [parts.unet(*batch).sample for batch in batches]
        signal = parts.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        predicted = (noisy - (1 - signal).sqrt() * torch.cat(outputs)) / signal.sqrt()
        flowing = torch.lerp(clean, noise, (timesteps / 1000).view(-1, 1, 1, 1))
        return torch.stack([noisy, predicted, flowing])[rows % 3, torch.arange(len(rows))]

    def _save_pipeline(self, network, tokenizer, vae, scheduler) -> None:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=network["text"],
            tokenizer=tokenizer,
            unet=network["unet"],
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(torch.float16).save_pretrained(self.out / "pipeline")  # float16 keeps the package small
        # transformers loads the text encoder in this dtype, while diffusers loads all other parts in float32.
        config = self.out / "pipeline" / "text_encoder" / "config.json"
        values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _save_flow(self, transformer) -> None:
        """Save the transformer and its schedule; the other parts of the model are those of the pipeline."""
        transformer.half().save_pretrained(self.out / "flow" / "transformer")
        FlowMatchEulerDiscreteScheduler().save_pretrained(self.out / "flow" / "scheduler")
        index = {"_class_name": FLOW_OF_SHAPES, "transformer": ["diffusers", "SD3Transformer2DModel"]}
        index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
        (self.out / "flow" / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKL, rows: Tensor) -> Tensor:
        """Mean latents of the images in `rows`, unscaled, (N, 4, 8, 8)."""
        batches = tqdm(rows.split(64), desc="latents", leave=False)
        return torch.cat([vae.encode(self.images[b].float() / 127.5 - 1).latent_dist.mean for b in batches])

    def _train(
        self,
        stage: str,
        network: nn.Module,
        loss: Callable,
        lr: float,
        averaged: bool = True,
        cycles: int = 1,
        count: int | None = None,
    ) -> nn.Module:
        """Fit `network`, continuing from the state in the work folder. The learning rate has `cycles` cycles.

        Batches are drawn from `count` rows, by default those of all images.

        Returns it with the moving average of its weights, or with the last ones if not `averaged`.
        """
        steps, batch = STAGES[stage]
        steps = self.steps or steps
        cycle = -(-steps // cycles)
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.998))
        optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=1e-3)
        parts = {"network": network, "average": average, "optimizer": optimizer}
        parts["schedule"] = _one_cycle(optimizer, lr, cycle)
        path, done = self.work / f"{stage}.pt", 0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            done = saved.pop("step")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        for step in tqdm(range(done, steps), desc=stage, initial=done, total=steps, mininterval=2):
            if step and step % cycle == 0:
                parts["schedule"] = _one_cycle(optimizer, lr, cycle)
            generator = torch.Generator().manual_seed(_seed(self.seed, stage, step))
            rows = torch.randint(count or len(self.images), (batch,), generator=generator)
            value = loss(network, rows, generator)
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            parts["schedule"].step()
            average.update_parameters(network)
            if (step + 1) % 200 == 0 or step + 1 == steps:
                tqdm.write(f"{stage} step {step + 1}: loss {value.item():.4f}")
                state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
        return (average.module if averaged else network).eval().requires_grad_(False)


def _one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.03)


def contrastive(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric contrastive loss over a batch of pairs, (B, D) and (B, D)."""
    logits = logit_scale.exp().clamp(max=100) * image_embeds @ text_embeds.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _add_noise(images: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise; each image gets its own standard deviation, drawn from [0, most]."""
    sigma = most * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + sigma * torch.randn(images.shape, generator=generator)


def _seed(seed: int, stage: str, step: int) -> int:
    return zlib.crc32(f"{seed}/{stage}/{step}".encode())


if __name__ == "__main__":
    sys.exit(main())
