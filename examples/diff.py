"""Write docs/examples.md: what token superposition changes in each script, from the scripts themselves.

python -m examples.diff
"""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/examples.md"
NAMES = {
    "nanogpt": "A plain PyTorch loop, as in nanoGPT",
    "ddp": "A plain PyTorch loop on several processes",
    "hf_trainer": "The transformers Trainer with streaming datasets",
    "lightning_example": "Lightning: a callback and a data module",
    "litgpt_pretrain": "LitGPT pre-training",
    "accelerate_loop": "accelerate's own loop",
    "mamba": "A model that is not a transformer",
    "continued_pretraining": "Continued pre-training from a checkpoint",
    "muon": "Muon in place of AdamW",
}
REMARKS = {
    "nanogpt": "Four things: bags are folded, the embedding averages them, the loss takes them, and the schedule "
    "says which step has which bag size. `--ratio 0` gives the losses of the plain script. A model that unpacks the "
    "shape of its ids, as nanoGPT's `b, t = idx.size()`, asks for `b, t = idx.shape[:2]`.\n\n"
    "- nanoGPT itself fetches a batch ahead, inside the loop of its micro-steps: ask the schedule for the step that "
    "the batch is *for*, or the first one after the switch is still of bags.\n"
    "- Targets of -1, which nanoGPT leaves out of the loss, need `ignore_index=-1`.\n"
    '- Weights of the targets go to the loss: `place_weights("exponential", targets.shape[-1])` while `targets.dim() '
    '== 3`. Those of what is read go to `superpose(model, model.wte, input_weighting="power")`.\n'
    "- For every token read once, and for several processes (`torchrun`), take the batches from a plan, as the next "
    "script does.\n"
    "- A run may become longer only in its recovery phase: `Schedule.two_phase(longer, ...)` moves the switch, and "
    "the script refuses to go on. `Schedule([Phase(90, 4, 4), Phase(longer - 90)])` keeps it where it was.",
    "ddp": "The plan has the whole run's steps, and `loader` gives each process its micro-batches of every step; "
    "where a run goes on, `first_batch` passes over those that were read. Save `plan.fingerprint()` in the "
    "checkpoint, and give it to `plan.check_fingerprint` then. The loss comes out of the `forward` that DDP wraps: "
    "gradients of a decoder or a head that is called on `model.module` are not averaged, and nothing says so.",
    "hf_trainer": "The `Trainer` is one line. The other change is that samples of bags are longer than the blocks "
    "of `group_texts`, so `StreamedPlan` cuts the stream instead; the held-out text still goes through `group_texts` "
    "and is evaluated the stock way. For text on this disk, `PlannedDataset` reads faster and needs no reading up to "
    "the step where a run goes on. Where the validation loss stops a run early, give `eval_delay`, one step more "
    "than the switch: before it the loss is that of a model that trains on something else.",
    "lightning_example": "Lightning starts a data loader from its beginning, so `InOrder` begins where the run is, "
    "also inside an accumulated step (`global_step` counts every optimizer's steps, where there are two), and shares "
    "out every step among processes. An epoch is the whole run: validate every so many batches, and let `max_steps` "
    "end it. `use_distributed_sampler=False` takes the sampler of the validation away, too, so the script has its "
    "own.",
    "litgpt_pretrain": "LitGPT's GPT gives logits, so this takes the loss of logits. Its `CycleIterator` begins a "
    "loader again that ends: with a plan too short for all processes that would be bags again, which the plan warns "
    "of. LitGPT keeps `train_dataloader` in its checkpoint, and with it all that its dataset holds; leave it out, "
    "and go on with `plan.loader(..., first_batch=iteration)`. LitGPT 0.5.13 requires a huggingface-hub below 1.4, "
    "transformers 5 a newer one: install it without its dependencies, as the script says.",
    "accelerate_loop": "Loss on logits, because under DDP the gradients are only averaged if the model's own "
    "`forward` is called. `PlannedDataset` is read in order; accelerate shares every step's batch out among the "
    "processes. A scheduler that goes through `accelerator.prepare` steps once for each process, so that "
    "`LambdaLR(optimizer, WSD(steps))` would be at its end too soon: set `step_scheduler_with_optimizer=False` and "
    "call it where `sync_gradients`, or set the rate of the step as the script for plain PyTorch does.",
    "mamba": "The embedding is all that reads bags, so what comes after it is not asked.",
    "continued_pretraining": "The model has only ever read single tokens, so the first steps on bags cost some of "
    "what it knows, and the recovery phase has to win that back: watch the validation loss before and after. The "
    "paper trains from scratch; whether this pays with a checkpoint has not been measured here. The optimizer is new "
    "and warms up once, before the bags; its state and its learning rate run through the switch.",
    "muon": "The two optimizers run through the switch as they are.",
}


def page() -> str:
    parts = [
        "# In the training script that you have",
        "Made by `python -m examples.diff` from the scripts in `examples/plain` and `examples`: each runs as it is "
        "(that of the Trainer on text files of yours), tests run both, and with `--ratio 0` a script with TST trains "
        "ordinarily. Below, `-` is the script without TST and `+` the one with it.",
    ]
    for name, title in NAMES.items():
        plain, tst = (folder / f"{name}.py" for folder in (HERE / "plain", HERE))
        old, new = plain.read_text().splitlines(), tst.read_text().splitlines()
        about = (ast.get_docstring(ast.parse(tst.read_text())) or "").split("\n\n")
        lines = difflib.unified_diff(old, new, f"examples/plain/{name}.py", f"examples/{name}.py", n=1, lineterm="")
        commands = "\n".join(
            line for part in about[1:] for line in part.splitlines() if " -m " in line or "pip " in line
        )
        parts += [f"## {title}", f"```bash\n{commands}\n```", REMARKS[name], "```diff\n" + "\n".join(lines) + "\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
