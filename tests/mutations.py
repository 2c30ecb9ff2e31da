"""Changes one line of training at a time, and shows which tests notice it. Run by hand; it takes about 20 minutes.

    python tests/mutations.py [PART OF A NAME]

The repository is copied to a temporary folder first. Ends with the number of changes that no test noticed.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEP, COMMAND, BATCHES, LOSS = "training/simclr.py", "training/pretrain.py", "training/batches.py", "training/loss.py"
WIRING = ["tests/training/test_wiring.py"]
RUNS = [
    "tests/training/test_pretrain.py",
    "-k",
    "(seed or process or average or early or views or chunks or scale) and not report",
]
TWO = ["tests/training/test_distributed.py", "-k", "weights_of_one or loss_and_the_gradients"]
MEMORY = ["tests/training/test_memory.py"]

# Name: file, text, replacement, arguments of pytest
MUTATIONS = {
    "batch norm is not synchronised": (COMMAND, "if gpu and devices * nodes > 1:", "if False:", WIRING),
    "only the encoder is synchronised": (COMMAND, "zoo.synchronised(module.projector)", "module.projector", WIRING),
    "a GPU trains in float32": (COMMAND, '"bf16-mixed" if', '"32-true" if', WIRING),
    "--max-steps is ignored": (COMMAND, "max_steps=settings.max_steps or -1", "max_steps=-1", WIRING),
    "no gather of projections": (STEP, "gather(view.float())", "view.float()", TWO),
    "projections are gathered in bfloat16": (
        STEP,
        "gather(view.float())",
        "gather(view)",
        ["tests/training/test_pretrain.py", "-k", "gathered_in_float32"],
    ),
    "gather drops the gradients of other processes": (LOSS, "torch.distributed.all_reduce(gradient)", "pass", TWO),
    "the same order in every epoch": (BATCHES, "[settings.seed, epoch]", "[settings.seed, 0]", WIRING),
    "the order ignores the seed": (BATCHES, "[settings.seed, epoch]", "[0, epoch]", WIRING),
    "the same share for every process": (BATCHES, "batches[:, rank::world]", "batches[:, 0::world]", WIRING),
    "every process takes the whole batch": (BATCHES, "batches[:, rank::world]", "batches", WIRING),
    "the trainer's epoch is ignored": (
        BATCHES,
        "trainer.current_epoch, trainer.global_rank",
        "0, trainer.global_rank",
        WIRING,
    ),
    "the trainer's rank is ignored": (
        BATCHES,
        "trainer.current_epoch, trainer.global_rank",
        "trainer.current_epoch, 0",
        WIRING,
    ),
    "resident batches of other pictures": (
        BATCHES,
        "yield self.resident[share]",
        "yield self.resident[share - 1]",
        WIRING,
    ),
    "the schedule counts epochs": (STEP, '"interval": "step"', '"interval": "epoch"', WIRING),
    "the schedule ends too late": (
        STEP,
        "s.epochs * self.steps_per_epoch",
        "2 * s.epochs * self.steps_per_epoch",
        WIRING,
    ),
    "--warmup is ignored": (STEP, "s.warmup, s.epochs", "0.1, s.epochs", WIRING),
    "--lr-scaling is ignored": (STEP, "s.batch_size, s.lr_scaling", 's.batch_size, "sqrt"', WIRING),
    "--encoder-lr is ignored": (STEP, "lr * s.encoder_lr", "lr", WIRING),
    "--momentum is ignored": (STEP, "groups, lr, s.momentum", "groups, lr, 0.9", WIRING),
    "--weight-decay is ignored": (
        STEP,
        "lars_groups(self.encoder, s.weight_decay)",
        "lars_groups(self.encoder, 1e-4)",
        WIRING,
    ),
    "--optimizer is ignored": (STEP, "OPTIMIZERS[s.optimizer]", 'OPTIMIZERS["lars"]', WIRING),
    "--temperature is ignored": (STEP, "self.settings.temperature)", "0.2)", WIRING),
    "--loss-scale is ignored": (STEP, "loss * self.settings.loss_scale", "loss", WIRING),
    "--loss is ignored": (
        STEP,
        "LOSSES[self.settings.loss].function",
        'LOSSES["nt_xent"].function',
        ["tests/training/test_pretrain.py", "-k", "loss_of_a_step"],
    ),
    "--head-layers is ignored": (
        STEP,
        "settings.head_layers, settings.head_dimension",
        "1, settings.head_dimension",
        ["tests/training/test_pretrain.py", "-k", "head_of_other_layers"],
    ),
    "--head-dimension is ignored": (
        STEP,
        "settings.head_layers, settings.head_dimension",
        "settings.head_layers, 128",
        WIRING,
    ),
    "augmentation is ignored": (
        STEP,
        "height, width, self.settings.augment",
        "height, width, type(self.settings.augment)()",
        WIRING,
    ),
    "draws ignore the seed": (STEP, "self.settings.seed, step, self.global_rank", "0, step, self.global_rank", WIRING),
    "draws ignore the step": (
        STEP,
        "self.settings.seed, step, self.global_rank",
        "self.settings.seed, 0, self.global_rank",
        WIRING,
    ),
    "draws ignore the process": (STEP, "self.settings.seed, step, self.global_rank", "self.settings.seed, step", RUNS),
    "initial weights ignore the seed": (
        STEP,
        "torch.manual_seed(settings.seed)",
        "torch.manual_seed(0)",
        ["tests/training/test_wiring.py", "tests/training/test_distributed.py", "-k", "initial or weights_of_one"],
    ),
    "only the first pair of views counts": (STEP, "combinations(all_z, 2)", "[(all_z[0], all_z[1])]", RUNS),
    "chunks share the draws of the first": (
        STEP,
        "view[part] for view",
        "view[: part.stop - part.start] for view",
        RUNS,
    ),
    "--ema is ignored": (STEP, "self.average.update(self.encoder)", "pass", RUNS),
    "the average is always kept": (STEP, "if is_kept:", "if ends:", RUNS),
    "an early stop keeps the last weights": (STEP, "self.load_state_dict(saved)", "pass", RUNS),
    "pictures fill the GPU that a step needs": (BATCHES, "- step_bytes(module, module.local_batch)", "- 0", MEMORY),
}


def main(part: str = "") -> None:
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "data", "out", "__pycache__")
        )
        for name, (file, text, replacement, tests) in MUTATIONS.items():
            if part not in name:
                continue
            path = copy / file
            source = path.read_text()
            if text not in source:
                sys.exit(f"{file} has no longer {text!r}")
            path.write_text(source.replace(text, replacement))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
            path.write_text(source)
            if result.returncode not in (0, 1):
                sys.exit(f"{name}: pytest failed\n{result.stdout[-2000:]}")
            noticed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
            survived += [] if result.returncode else [name]
            print(
                f"{name}: {noticed[0].split(' - ')[0] if noticed else 'not noticed' if name in survived else 'error'}",
                flush=True,
            )
    print(f"survived: {len(survived)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
