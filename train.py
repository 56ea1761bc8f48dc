"""Train the adapter; the backbone stays frozen.

    python train.py                                             the demo: no download, no GPU, a minute or two
    python train.py --data meld --llm PATH [--data-dir DIR]     a data set and a backbone
    python train.py --seeds 1111 2222 3333 4444 5555            the paper's protocol, with a table at the end
    python train.py -h                                          every setting

Each seed has its own folder, OUT/SEED: settings.json, log.jsonl (a line per epoch) and report.svg,
adapter.safetensors (the best epoch by validation) and features.json (the training features' range),
predictions.csv and metrics.json (the test split), and last of all results.json. The same command again
continues what was interrupted (by Ctrl-C, SIGTERM or SIGHUP, or killed), on a CPU to the same bytes; finished
runs are left alone.
"""
import argparse
import copy
import hashlib
import math
import sys
import textwrap
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from adapter import MODALITIES, AdapterConfig, AdapterError, MSEAdapter, MultimodalLLM, adapter_bytes
from data import FEATURES, HERE, SPLITS, TASKS, Split, collate, epoch_rows, find_llm
from data import load_split, load_tokenizer, preset, share_of
from eval import DECODE, DTYPES, READOUT, ablation, alarms, code_digests, count, edited, evaluate
from eval import evaluate_all, metrics_of, side_by_side
from model import CheckpointError, Config, default_dtype, load_llm
from reports.clip import feature_range
from reports.pictures import report
from reports.tables import in_names, in_words, read_record, recorded, summarize, write_results, write_table
from support.check import check_task
from support.files import UserError, brief, json_bytes, printable, read_json, write_atomic
from support.guards import check_device, device_advice, failed_device, locked, run_program, uninterrupted
from support.states import load_state, save_state, states

# The release's, for every task and family.
WARMUP = 0.1                # share of all steps in which the learning rate climbs from 0
WEIGHT_DECAY = 0.01
ADAM_EPS = 1e-4

SAVE_SECONDS = 600          # a state is written so often within an epoch, for those who are killed
SAY_SECONDS = 180           # a line is printed so often within an epoch, where there is no progress bar
GIB = 2**30


# --- Settings -----------------------------------------------------------------------------------------------
def setting(kind, default, about: str, free=False, report=True):
    """A field of Settings, which is a flag of the command line, too.

    kind: bool for a switch, a function that reads the flag's text, or the texts to choose from.
    free: the value may change before a run goes on.
    report: the value shapes what is trained. A run that differs in it from the release is not held against
    the release's figures; so it is with each new flag, unless it says report=False.
    """
    flag = {"help": about}
    if kind is bool:
        flag["action"] = "store_true"
    elif callable(kind):
        flag["type"] = kind
    else:
        flag["choices"] = kind
    if kind is not bool and default is not None:
        flag["help"] += f" [{default}]"
    return field(default=default, metadata={"flag": flag, "free": free, "report": report and not free})


def share(text: str) -> float:
    if not 0 < float(text) <= 1:            # neither is nan
        raise argparse.ArgumentTypeError(f"{text:.40} is not above 0 and at most 1")
    return float(text)


def utf8(text: str) -> str:
    if text != text.encode(errors="replace").decode():      # settings.json could not hold it
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no UTF-8; rename the folder, or link to it")
    return text


@dataclass
class Settings:
    """Everything that shapes a run. None: the release's value for task and family (`preset` in data.py)."""
    # What trains on what.
    data: str = setting(TASKS, "demo", "task", report=False)
    data_dir: str = setting(utf8, None, "folder with the published files somewhere below", free=True)
    llm: str = setting(utf8, None, "backbone: a checkpoint folder or a hub name", free=True)
    out: str = setting(utf8, None, "folder of the runs, one subfolder per seed [runs/DATA-LLM]", free=True)
    seeds: list = field(default_factory=lambda: [1111], metadata={
        "flag": {"type": int, "nargs": "+",
                 "help": "train once for each; the paper's are 1111 2222 3333 4444 5555"},
        "free": True,
        "report": False})
    official: bool = setting(
        bool, False, "rows, losses and answers as in the release, quirks included", report=False)

    # The schedule and the sizes.
    learning_rate: float = setting(share, None, "peak of the schedule")
    batch_size: int = setting(count, None, "rows per step")
    epochs: int = setting(count, None, "length of the cosine, at whose end the learning rate is 0")
    max_epochs: int = setting(count, None, "end here at the latest [epochs]")
    patience: int = setting(count, None, "epochs without a better validation score to stop after")
    pseudo_tokens: int = setting(count, None, "P")
    audio_hidden: int = setting(count, None, "width of the audio LSTM's state")
    video_hidden: int = setting(count, None, "width of the video LSTM's state")

    # Ablations and baselines.
    no_mixer: bool = setting(bool, False, "ablation: add the modalities, without the text's product")
    no_fusion: bool = setting(bool, False, "ablation: one linear layer instead of Multi-Scale-Fusion")
    modality: str = setting(MODALITIES, "both", "ablation: what the adapter gets")
    independent_tokens: bool = setting(bool, False, "pseudo tokens of their own, no copies of one vector")
    train_share: float = setting(share, 1.0, "train with this share of the rows, drawn by the seed")
    valid_share: float = setting(
        share, 0.0, "validate with this share of the training rows, drawn by the seed, where there is no "
        "valid split")
    prompt_alone: bool = setting(bool, False, "no training, no tokens: print what the frozen backbone scores")

    # How answers are read, and where and how all is computed.
    decode: str = setting(
        DECODE, "greedy", "how answers are read when epochs are compared and tested", report=False)
    readout: str = setting(READOUT, "mean", "an intensity under --decode labels", report=False)
    eval_batch: int = setting(count, 32, "rows at a time when answering", free=True)
    recompute: int = setting(
        int, None, "blocks that compute their activations again in backward, which saves memory [on a GPU as "
        "few as fit, on a CPU none]", free=True)
    device: str = setting(
        str, "auto", "cpu, cuda, cuda:1, mps, ...; auto takes a GPU if there is one", report=False)
    dtype: str = setting(
        DTYPES, "auto", "of the backbone; int8 takes half the memory of 16 bits", report=False)
    overwrite: bool = setting(bool, False, "discard what the run's folder holds", free=True)
    download: bool = setting(bool, False, "fetch data set and backbone if they are not here", free=True)

    def backbone(self) -> str:
        """The backbone's name, without the folders above it."""
        return Path(self.llm or TASKS[self.data].llm).name


def parse_settings(argv=None) -> Settings:
    """The command line, made from the dataclass: --batch-size 8, --official."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        parser.add_argument("--" + f.name.replace("_", "-"), **f.metadata["flag"])
    return Settings(**vars(parser.parse_args(argv)))


def resolve(settings: Settings, family: str) -> Settings:
    """Fill in what was left to the release's presets and to the machine. Raises UserError for its device."""
    task = TASKS[settings.data]
    # What was given counts, then the preset, then the default.
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    s = Settings(**(preset(task, family)._asdict() | given))
    s.max_epochs = s.max_epochs or s.epochs
    s.patience = s.patience or (8 if task.labels else 10)       # the release's
    if s.out is None:
        s.out = f"runs/{s.data}-{s.backbone()}"
        if s.official:
            s.out += "-official"
    if s.device == "auto":
        s.device = "cpu"
        if torch.cuda.is_available():
            s.device = "cuda"
        elif torch.backends.mps.is_available():         # Apple's
            s.device = "mps"
    check_device(s.device)
    if s.dtype == "auto":
        dtype = default_dtype(s.device)
        if s.official and dtype == torch.bfloat16:      # the release runs it in float16
            dtype = torch.float16
        s.dtype = str(dtype).removeprefix("torch.")
    return s


def changed(settings: Settings, family: str) -> list:
    """The settings in which a run's method differs from the release's for this data and backbone, by name."""
    # What free flags and the machine decide does not count: that is no part of a method.
    release = resolve(Settings(data=settings.data), family)
    shaping = [f.name for f in fields(Settings) if f.metadata["report"]]
    return [name for name in shaping if getattr(settings, name) != getattr(release, name)]


def difference(before: dict, identity: dict) -> str:
    """Another setting, other weights or data than those that a run was begun with, in words; or ""."""
    # Data and backbone may move: what they hold is a part of the identity, where they lie is free.
    free = [f.name for f in fields(Settings) if f.metadata["free"]]
    for name, now in identity.items():
        began = before.get(name)
        if name not in free and name != "code" and began != now:
            return f"{name} {began!r:.60}, now {now!r:.60}"
    return ""


# --- The schedule -------------------------------------------------------------------------------------------
def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """1) climb from 0 over the first `warmup` of all steps, 2) fall along a cosine to 0, 3) stay there.

    (In the release the cosine climbs again past its end.)
    """
    climb = steps * warmup
    if step < climb:
        return peak * step / climb
    if step < steps:
        fallen = (step - climb) / max(1, steps - climb)     # 0 to 1
        return peak * 0.5 * (1 + math.cos(math.pi * fallen))
    return 0.0


# --- One step -----------------------------------------------------------------------------------------------
def make_optimizer(net: MultimodalLLM):
    # The learning rate is set before each step: see train_epoch.
    return torch.optim.AdamW(net.adapter.parameters(), eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)


def train_step(net: MultimodalLLM, optimizer, scaler, batch, recompute: int = 0):
    """One step of AdamW on one batch; returns the mean loss of its rows, on the device."""
    optimizer.zero_grad()
    loss = net.loss(batch, recompute)       # through the frozen LLM, which gets no gradients of its own
    if loss.device.type == "cpu":           # a GPU would be waited for before backward: train_epoch looks
        check_finite(loss.detach(), net)
    scaler.scale(loss).backward()           # the scaler acts for a float16 backbone only
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def check_finite(loss, net: MultimodalLLM):
    """Raise UserError that names the first tensor of the adapter that is not finite, if the loss is not."""
    if not math.isfinite(loss):
        # Features are finite (data.py cleans them), so a weight broke, or the backbone's arithmetic did.
        broken = [name for name, p in net.adapter.named_parameters() if not p.isfinite().all()]
        broken.append("what the backbone makes of the pseudo tokens")
        raise UserError(f"the loss is {float(loss)}: first not finite: {broken[0]}; the last good adapter is "
                        "kept, try a smaller --learning-rate or --dtype float32")


def kept_by_block(c: Config) -> int:
    """Numbers per token that a frozen block keeps for backward; fewer where heads share keys and values."""
    # Linear layers keep nothing, for no weight trains.
    norms = 2 * c.dim                           # their inputs
    attention = 6 * c.n_head * c.head_dim       # q and k, turned; qkv, of which v is a part; the output
    mlp = 3 * c.ffn_dim                         # gate, silu(gate), up
    return norms + attention + mlp


def plan_recompute(net: MultimodalLLM, train: Split, settings: Settings) -> int:
    """How many blocks recompute: as few as let the longest rows fit four fifths of a GPU's free memory."""
    layers = net.llm.config.n_layer
    # By characters, which is near enough; a batch is padded to its longest row.
    longest = sorted(range(len(train)), key=lambda row: -len(train.text[row]))
    with torch.no_grad():
        x, _, _ = net.rows(collate(train, longest[:settings.batch_size]))       # (B, T, C)
    # What is kept for backward by a block that recomputes, its input alone, and by one that does not.
    least = x.nbytes / GIB
    most = x[..., 0].nbytes / GIB * kept_by_block(net.llm.config)
    room = math.inf                     # a GPU's memory is counted, no other's
    if x.is_cuda:
        torch.cuda.empty_cache()        # what an earlier seed let go is free, too
        free, _ = torch.cuda.mem_get_info(x.device)
        room = 0.8 * free / GIB         # a fifth is left for the head and the adapter
    blocks = blocks_to_recompute(settings.recompute, layers, least, most, room)
    weights = sum(p.nbytes for p in net.llm.parameters()) / GIB
    print(f"memory: weights {weights:.2f} GiB, activations {layers * most:.2f} GiB without and "
          f"{(layers - 1) * least + most:.2f} GiB with recomputation: {blocks} of {layers} blocks recompute",
          flush=True)
    return blocks


def blocks_to_recompute(asked: int | None, layers: int, least: float, most: float, room: float) -> int:
    """How many blocks keep `least`, where the others keep `most`: as many as `asked`, or, where it is None,
    as must for all to fit into `room`.

    The last block never does: backward begins with it, so nothing would be saved.
    """
    blocks = asked
    if asked is None:
        blocks = (layers * most - room) / (most - least)        # below 0 where there is room to spare
    return math.ceil(min(max(0, blocks), layers - 1))


# --- The loop -----------------------------------------------------------------------------------------------
def fit(run: "Run", train: Split, valid: Split):
    """Train until the epochs or the patience run out. Leaves the best adapter in run.best and the folder."""
    s = run.settings
    recompute = plan_recompute(run.net, train, s)
    run.load()                          # if it was interrupted
    publish(run)                        # if it was killed between a state and the files that follow from it
    try:
        while len(run.log) < s.max_epochs and len(run.log) - run.best_epoch() < s.patience:
            # 1) what is left of the epoch's steps
            train_epoch(run, train, recompute)
            # 2) validate, in evaluation mode
            result = evaluate(run.net, valid, s.eval_batch, s.decode, s.readout)
            with uninterrupted():
                # 3) close the epoch; keep its adapter if it is the best
                run.close_epoch(result)
                # 4) write it down, the state first: all else follows from it
                run.save()
                publish(run)
            print_epoch(run, result, valid)
    except KeyboardInterrupt:           # between two steps: see uninterrupted
        run.save()
        print("interrupted; the state is saved, the same command again continues", file=sys.stderr)
        raise
    except (RuntimeError, MemoryError) as error:
        if not failed_device(error):
            raise
        run.save()                      # the step that failed did so before the optimizer, which needs little
        raise UserError(f"{device_advice(error)}; the state is saved, the same command continues, with "
                        "another --recompute and --eval-batch, too") from None


def train_epoch(run: "Run", train: Split, recompute: int):
    """The steps that the epoch still has."""
    s = run.settings
    epoch = len(run.log)
    order = epoch_rows(len(train), s.batch_size, run.seed, epoch)       # a function of (seed, epoch) alone
    steps = len(order)
    run.net.train()                     # evaluate switched to evaluation mode; an adapter may have dropout
    bar = tqdm(order[run.step:], f"epoch {epoch + 1}", steps, initial=run.step, leave=False, disable=None)
    for rows in bar:
        with uninterrupted():
            rate = learning_rate(epoch * steps + run.step, s.epochs * steps, WARMUP, s.learning_rate)
            for group in run.optimizer.param_groups:        # there may be several
                group["lr"] = rate
            loss = train_step(run.net, run.optimizer, run.scaler, collate(train, rows), recompute)
            run.losses = torch.cat((run.losses, loss[None]))
            run.step += 1
            if run.step == steps or time.time() - run.saved > SAVE_SECONDS:     # validation may take long
                check_finite(run.losses.sum(), run.net)         # what is saved can go on
                run.save()
        if run.step == 1:
            run.check_gradients()
        # Now and then the losses are looked at, for which a GPU is waited for.
        if run.step % 20 == 0 or run.step == steps:
            check_finite(run.losses.sum(), run.net)
            loss = float(run.losses.mean())
            bar.set_postfix(loss=loss, lr=rate, refresh=False)
            if bar.disable and time.time() - run.said > SAY_SECONDS:        # into a file
                line = f"epoch {epoch + 1}, step {run.step}/{steps}: loss {loss:.4f}"
                run.say(line, epoch + run.step / steps)


def is_score(x) -> bool:
    """Is it a number that can be logged? nan and infinities are scores, too."""
    return isinstance(x, float) or type(x) is int and abs(x) < 2**63


def print_epoch(run: "Run", result, valid: Split):
    """One line for the epoch, three validation rows, and an alarm where something looks wrong."""
    now = run.log[-1]
    name = run.task.select
    best = " (best yet)" if run.best_epoch() == len(run.log) else ""
    run.say(f"epoch {now['epoch']}/{run.settings.max_epochs}: loss {now['loss']:.4f}, "
            f"valid {name.replace('_', ' ')} {now[f'valid_{name}']:.4f}{best}, "
            f"unparsed {result.unparsed}/{len(valid)}", len(run.log))
    for quarter in (1, 2, 3):
        row = quarter * len(valid) // 4
        truth, answer = in_names(run.task, [valid.label[row], result.values[row]])
        print(printable(f"  {truth}, answered {answer}: {' '.join(valid.text[row].split()):.60}"))
    for alarm in alarms(result):
        print(alarm)
    unparsed = [entry["valid_unparsed"] for entry in run.log[-2:]]      # of the epoch before, and of this one
    if unparsed[-1] > unparsed[0] + 0.01 * len(valid):
        print(f"more answers do not parse: {unparsed[0]} before, {unparsed[-1]} now")
    sys.stdout.flush()


def clock(seconds: float) -> str:
    """83.2 -> "1:23", 3683.2 -> "1:01:23"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --- A run's state ------------------------------------------------------------------------------------------
class Run:
    """One seed's training: what takes part, and how far it is."""

    def __init__(self, settings: Settings, seed: int, llm, tokenizer, train: Split, valid: Split):
        s = settings
        self.settings = s
        self.seed = seed
        self.task = TASKS[s.data]
        self.folder = Path(s.out, str(seed))
        config = AdapterConfig(
            dim=llm.config.dim,
            audio_dim=train.audio[0].shape[1],
            video_dim=train.video[0].shape[1],
            audio_hidden=s.audio_hidden,
            video_hidden=s.video_hidden,
            pseudo_tokens=s.pseudo_tokens,
            no_mixer=s.no_mixer,
            no_fusion=s.no_fusion,
            modality=s.modality,
            independent_tokens=s.independent_tokens)
        assert FEATURES in MODALITIES.values(), f"adapter.py has {MODALITIES}, support/check.py {FEATURES}"
        torch.manual_seed(seed)         # for the adapter's start, and for all that training draws
        adapter = MSEAdapter(config)
        best = copy.deepcopy(adapter)   # has its own weights: it stays behind while training goes on
        adapter.to(s.device)            # after the copy, which would take an LSTM's weights apart on a GPU
        best.to(s.device)
        if s.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(s.device)        # test reports this seed's
        self.net = MultimodalLLM(llm, adapter, tokenizer, self.task, s.official)
        self.best = MultimodalLLM(llm, best, tokenizer, self.task, s.official)     # the best epoch's
        self.optimizer = make_optimizer(self.net)
        fp16 = llm.embed.weight.dtype == torch.float16          # its gradients are small
        self.scaler = torch.amp.GradScaler(torch.device(s.device).type, enabled=fp16)
        self.parts = (adapter, best, self.optimizer, self.scaler)           # whatever has a state
        self.chance = chance(self.task, train, valid)
        self.log = []               # an entry per finished epoch
        self.step = 0               # steps taken in the epoch under way
        self.losses = torch.zeros(0, device=s.device)       # of those steps; none waits for the GPU
        self.began = time.time()
        self.saved = self.began     # when a state was last written
        self.said = self.began      # when a line was last printed
        self.check_parameters()

    def check_parameters(self):
        """Raise UserError if a parameter would train without being saved, or without an optimizer."""
        saved = set(self.net.adapter.parameters())
        stepped = set()                             # what the optimizer changes
        for group in self.optimizer.param_groups:
            stepped.update(group["params"])
        for name, p in self.net.named_parameters():
            if not p.requires_grad:
                continue
            if p not in saved:
                raise UserError(f"{name} wants a gradient, but stands outside of the adapter, where it would "
                                "neither be counted nor saved; put it into MSEAdapter, or freeze it")
            if p not in stepped:
                raise UserError(f"{name} wants a gradient, but the optimizer does not have it; add it in "
                                "make_optimizer, or freeze it")

    def check_gradients(self):
        """Raise UserError if a parameter has no part in the loss: a module that `forward` forgot."""
        for name, p in self.net.adapter.named_parameters():
            if p.requires_grad and p.grad is None:
                raise UserError(f"{name} gets no gradient, for nothing computes with it; use it in "
                                "MSEAdapter.forward, or take it out")

    def best_epoch(self) -> int:
        """Counted from 1; 0 if there is none yet."""
        if not self.log:
            return 0
        best, worst = (max, -math.inf) if self.task.labels else (min, math.inf)     # a weighted F1 or an MAE
        scores = []
        for entry in self.log:
            score = entry[f"valid_{self.task.select}"]
            scores.append(worst if math.isnan(score) else score)
        return scores.index(best(scores)) + 1

    def close_epoch(self, result):
        """Log the epoch under way with its validation; keep its adapter if none was better."""
        parts = self.losses.tensor_split(min(self.step, 50))
        self.log.append({
            "epoch": len(self.log) + 1,
            "loss": float(self.losses.mean()),
            "losses": [round(float(part.mean()), 4) for part in parts],     # at most 50, in equal parts
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{f"valid_{name}": value for name, value in result.scores.items()},
            "valid_unparsed": result.unparsed,
            "seconds": round(time.time() - self.began, 2)})
        self.step = 0
        self.losses = self.losses.new_zeros(0)
        if self.best_epoch() == len(self.log):
            self.best.adapter.load_state_dict(self.net.adapter.state_dict())       # a copy of the numbers

    def say(self, line: str, epochs: float):
        """Print a line with the time until now and, after so many epochs, the time that is left."""
        taken = time.time() - self.began
        left = taken / epochs * (self.settings.max_epochs - epochs)
        self.said = time.time()
        print(f"{line}, {clock(taken)}, {clock(left)} left", flush=True)        # at most: patience may end it

    def save(self):
        """Write all from which the run goes on as if uninterrupted: state-EPOCH-STEP-SHA256.pt."""
        states = [part.state_dict() for part in self.parts]         # load restores them in this order
        random = [torch.get_rng_state()]            # what dropout draws from
        if self.settings.device.startswith("cuda"):
            random.append(torch.cuda.get_rng_state(self.settings.device))
        seconds = time.time() - self.began
        state = [states, random, self.log, self.step, self.losses, seconds]
        save_state(self.folder, len(self.log), self.step, state)
        self.saved = time.time()

    def load(self):
        """Go on from what was saved last, if anything was. Raises UserError if that is of no use."""
        if not states(self.folder):
            return
        groups = self.optimizer_groups()
        try:
            part_states, random, self.log, self.step, losses, seconds = load_state(self.folder)
            self.losses = losses.to(self.settings.device)
            for part, part_state in zip(self.parts, part_states, strict=True):
                part.load_state_dict(part_state)
            torch.set_rng_state(random[0])
            if len(random) > 1:
                torch.cuda.set_rng_state(random[1], self.settings.device)
            self.began -= seconds
            self.check_loaded(groups)
        except (UserError, OSError):        # all states are damaged, or the disk is
            raise
        except Exception as error:          # whatever a state of another version or make provokes
            if failed_device(error):
                raise
            raise UserError(f"{self.folder}: its state is of another version ({brief(error)[:200]}); start "
                            "again with --overwrite") from None
        print(f"continuing after epoch {len(self.log)}, step {self.step}", flush=True)

    def optimizer_groups(self) -> list:
        """Its settings, but for the learning rate, which is set before each step."""
        groups = []
        for group in self.optimizer.param_groups:
            groups.append({**group, "params": len(group["params"]), "lr": type(group.get("lr"))})
        return groups

    def check_loaded(self, groups: list):
        """Raise ValueError unless a state held what `save` writes. groups: optimizer_groups before."""
        if self.optimizer_groups() != groups:
            raise ValueError("the optimizer's settings")
        kept = set()                        # what the optimizer keeps of each parameter: the same
        for p, moments in self.optimizer.state.items():
            kept.add(tuple((name, x.dim() == 0) for name, x in moments.items()))
            if any(x.shape not in ((), p.shape) or not x.is_floating_point() for x in moments.values()):
                raise ValueError("the optimizer's moments")
            if not moments.get("step", 1) >= 1:         # AdamW divides by what it makes of the steps
                raise ValueError("the optimizer's steps")
        if len(kept) > 1:
            raise ValueError("the optimizer's moments")
        numbers = [self.began, *self.scaler.state_dict().values()]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise ValueError("times")
        fp32 = self.losses.dtype == torch.float32
        if type(self.step) is not int or self.losses.shape != (self.step,) or not fp32:
            raise ValueError("the losses")
        names = {"epoch", "loss", "losses", "learning_rate", "seconds", "valid_unparsed"}
        names.add(f"valid_{self.task.select}")
        if type(self.log) is not list:
            raise ValueError("the log")
        for entry in self.log:
            values = [value for name, value in entry.items() if name != "losses"] + entry["losses"]
            if not names <= entry.keys() or not all(is_score(x) for x in values):
                raise ValueError("an entry of the log")


# --- Records ------------------------------------------------------------------------------------------------
WRITTEN = ["results.json", "adapter.safetensors", "log.jsonl", "report.svg", "predictions.csv",
           "metrics.json", "features.json", "settings.json",
           *[f"predictions-{split}.csv" for split in SPLITS], *[f"metrics-{split}.json" for split in SPLITS]]


def chance(task, train: Split, valid: Split) -> float:
    """What one answer to all validation rows scores: the training rows' commonest class, or their mean."""
    answer = np.mean(train.label)
    if task.labels:
        answer = np.bincount(train.label).argmax()
    return metrics_of(task)(np.full(len(valid), answer), valid.label)[task.select]


def publish(run: Run):
    """Write the log, the picture and the best adapter. All of it is made again from the state."""
    if run.log:
        log = b"".join(json_bytes(entry) + b"\n" for entry in run.log)
        write_atomic(run.folder / "log.jsonl", log)
        draw(run)
        write_atomic(run.folder / "adapter.safetensors", adapter_bytes(run.best))


def draw(run: Run, result=None, worth=None):
    """Write report.svg; result, worth: see reports/pictures.py, once the test split is answered."""
    picture = report(run.log, run.task.select, run.best_epoch(), run.chance, result, worth)
    write_atomic(run.folder / "report.svg", picture.encode())


def discard(runs: dict):
    """Remove what runs, {folder: identity}, have written. If this very command left one of them unfinished,
    what it wrote stays: a job that was ended and is begun again has the same command line, --overwrite
    included."""
    own = [folder for folder, identity in runs.items() if overwritten(folder, identity)]
    unfinished = [folder for folder in runs if not (folder / "results.json").is_file()]
    if own and unfinished:
        print(f"{unfinished[0]}: going on with what this command began; delete {own[0]} to begin it anew")
    else:
        own = []
    with ExitStack() as locks:              # all or none
        for folder in runs:
            locks.enter_context(locked(folder))
        for folder in runs:
            if folder not in own:
                for file in [*states(folder), *(folder / name for name in WRITTEN)]:
                    file.unlink(missing_ok=True)


def overwritten(folder: Path, identity: dict) -> bool:
    """Whether this very command, --overwrite included, began what is in a run's folder."""
    file = folder / "settings.json"
    if not file.is_file():
        return False
    try:
        before = read_json(file)
    except UserError:
        return False                        # damaged: what is discarded need not be whole
    other = difference(before, identity) or edited(before, identity["code"])
    same_seeds = before.get("seeds") == identity["seeds"]
    return before.get("overwrite") is True and same_seeds and not other


def training_rows(settings: Settings, splits: dict, seed: int):
    """The rows to train with, before --train-share, and those to validate with."""
    if settings.valid_share:
        valid, train = share_of(splits["train"], settings.valid_share, seed, left=1)
        return train, valid
    return splits["train"], splits["valid"]


def train_run(settings: Settings, identity: dict, llm, tokenizer, splits: dict) -> dict:
    """Train one seed, pick the best epoch, test once with it. Returns the record that results.json holds.

    identity: what settings.json holds, the seed and the content of backbone and data with the settings.
    """
    seed = identity["seed"]
    folder = Path(settings.out, str(seed))
    results = folder / "results.json"           # written last: where it is, the run is finished
    train, valid = training_rows(settings, splits, seed)
    train, _ = share_of(train, settings.train_share, seed)
    by_other_code = check_same_run(folder, identity)
    if results.is_file():
        record = read_record(results)
        advice = "" if settings.overwrite else " (--overwrite discards it)"
        print(printable(f"seed {seed}: finished before{by_other_code}, left alone{advice}; "
                        f"test {record['line']}"))
    else:
        # What cannot be trained is refused by Run, before anything is written.
        run = Run(settings, seed, llm, tokenizer, train, valid)
        write_atomic(folder / "settings.json", json_bytes(identity, indent=1))
        write_atomic(folder / "features.json", json_bytes(feature_range(train)))
        trainable = sum(p.numel() for p in run.net.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in llm.parameters())
        print(f"seed {seed}: {trainable:,} parameters train, {frozen:,} are frozen")
        fit(run, train, valid)
        record = test(run, splits["test"], identity["code"])
        write_atomic(results, json_bytes(record, indent=1))
        print(f"wrote {folder}")
    # Nothing is left to continue, and drafts of what was killed are of no use.
    for file in [*states(folder), *folder.glob(".state-*.new"), *folder.glob(".adapter*.new")]:
        file.unlink(missing_ok=True)
    return record


def check_same_run(folder: Path, identity: dict) -> str:
    """Raise UserError if a run would go on with other settings, weights, data or code than it began with.
    Returns what a finished one of other code is, in words, or ""."""
    file = folder / "settings.json"
    if not file.is_file():
        return ""
    before = read_json(file)
    advice = "continue as it began, choose another --out, or discard it with --overwrite"
    other = difference(before, identity)
    if other:
        raise UserError(f"{folder}: begun with {other}; {advice}")
    names = ", ".join(edited(before, identity["code"]))
    if names and not (folder / "results.json").is_file():
        raise UserError(f"{folder}: begun with other code ({names} changed since); {advice}")
    return f" by other code ({names} changed since)" if names else ""


def test(run: Run, split: Split, code: dict) -> dict:
    """Answer the test split with the best epoch's adapter, in all ways of decoding. Returns the record.

    code: code_digests, of what was read when the program began.
    """
    s = run.settings
    results = evaluate_all(run.best, split, s.eval_batch, s.decode, s.readout)
    write_results(run.folder, split, results)
    result = next(iter(results.values()))       # the run's way; the others are in metrics.json
    print(f"test (best epoch {run.best_epoch()}): {result.line()}", flush=True)
    for alarm in alarms(result):
        print(alarm)
    select = run.task.select
    worth = None
    if s.modality != "text":
        worth = {"all": (result.scores[select], *result.intervals[select])}
        for name, less in ablation(run.best, split, s.eval_batch, s.decode, s.readout):
            print(f"test {name}: {in_words(less.scores)}", flush=True)
            worth[name] = (less.scores[select], *less.intervals[select])
    draw(run, result.picture(), worth)
    family = run.net.llm.config.family
    peak = 0
    if s.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(s.device)
    best = run.log[run.best_epoch() - 1]
    return {
        "seed": run.seed,
        "backbone": s.backbone(),
        "family": family,
        **{f.name: getattr(s, f.name) for f in fields(Settings) if not f.metadata["free"]},
        "code": hashlib.sha256(repr(code).encode()).hexdigest()[:8],
        "changed": changed(s, family),
        f"valid_{select}": best[f"valid_{select}"],
        **{f"test_{name}": value for name, value in result.scores.items()},
        "test_rows": len(split),
        "test_unparsed": result.unparsed,
        "line": result.line(),
        "best_epoch": run.best_epoch(),
        "ran_epochs": len(run.log),
        "seconds": run.log[-1]["seconds"],
        "gpu_gib": round(peak / GIB, 2),
        "torch": torch.__version__}


def digest(split: Split) -> str:
    """Of all texts, labels, lengths and features: some seconds for gigabytes."""
    # Row by row: the features are mapped, not in memory.
    small = [split.text, split.label, *[getattr(split, f"{kind}_len") for kind in FEATURES]]
    seal = hashlib.sha256(repr(small).encode())
    for kind in FEATURES:
        for row in range(len(split)):
            seal.update(split.features(kind, row).tobytes())
    return seal.hexdigest()[:16]


# --- A baseline: the frozen backbone by its prompt alone ----------------------------------------------------
class NoTokens(nn.Module):
    """In the adapter's place: nothing stands in front of the text."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config

    def forward(self, text, audio, audio_len, video, video_len):
        """As MSEAdapter.forward -> (B, 0, C)."""
        return text.new_zeros(len(text), 0, text.size(1))


def prompt_alone(llm, tokenizer, split: Split, settings: Settings) -> str:
    """What a split scores without an adapter and without training, a column per way of decoding."""
    config = AdapterConfig(llm.config.dim, 0, 0, 0, 0, pseudo_tokens=0)
    net = MultimodalLLM(llm, NoTokens(config), tokenizer, TASKS[settings.data], settings.official)
    results = evaluate_all(net, split, settings.eval_batch)
    lines = [side_by_side(results)]
    for name, result in results.items():
        lines += [f"{name}: {alarm}" for alarm in alarms(result)]
    return "\n".join(lines)


# --- The command --------------------------------------------------------------------------------------------
def load_splits(settings: Settings) -> dict:
    """{name: Split} of those that training needs. Raises UserError if they do not go together."""
    task = TASKS[settings.data]
    data_dir = settings.data_dir or HERE / task.home
    splits = {}
    for name in SPLITS:
        if name == "valid" and settings.valid_share:
            continue
        splits[name] = load_split(task, data_dir, name, settings.download)
    if settings.valid_share and len(splits["train"]) < 2:
        raise UserError(f"{data_dir}: one training row cannot be shared; expected at least two")
    for kind in FEATURES:
        widths = {name: getattr(split, kind)[0].shape[1] for name, split in splits.items()}
        if len(set(widths.values())) > 1:
            raise UserError(f"{data_dir}: {kind} features of a frame: {widths}; expected as many in each "
                            "split")
    return splits


def print_settings(settings: Settings, splits: dict, family: str):
    """What is trained on what: rows, backbone, settings."""
    train, valid = training_rows(settings, splits, settings.seeds[0])
    drawn = " (drawn from train by the seed)" if settings.valid_share else ""
    print(f"{settings.data}: {len(train)} train, {len(valid)} valid{drawn}, {len(splits['test'])} test rows; "
          f"backbone {settings.backbone()} ({family})")
    # What is off or not used, False or 0.0, is left out.
    chosen = [f"{name} {value}" for name, value in asdict(settings).items() if value not in (None, False)]
    text = "settings: " + ", ".join(chosen)
    print(textwrap.fill(text, 110, subsequent_indent="  ", break_on_hyphens=False), flush=True)


def main(argv=None):
    """Train once for each seed; argv: the flags, by default the command line's."""
    # What is asked for.
    settings = parse_settings(argv)
    seeds = settings.seeds
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: a seed twice; name each seed once")
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: expected whole numbers from 0 to {2**32 - 1}")
    task = TASKS[settings.data]

    # The data, and the settings that were left to it and to the backbone.
    path = find_llm(settings.llm or task.llm, settings.download)
    family = Config.from_dir(path).family
    check_task(task, family)
    splits = load_splits(settings)
    tokenizer = load_tokenizer(path)
    settings = resolve(settings, family)
    print_settings(settings, splits, family)

    # The backbone.
    llm = load_llm(path, settings.device, getattr(torch, settings.dtype))
    if sum(p.numel() for p in llm.parameters()) < 2e6:
        torch.set_num_threads(1)            # tensors this small are done before a second thread wakes up
    if settings.prompt_alone:
        print(prompt_alone(llm, tokenizer, splits["test"], settings))
        return
    note = recorded(family, task.name).get("note")          # of what is known of this pair
    if note:
        print(f"note: {note}", flush=True)

    # One run for each seed. It is known by its settings and by what data and backbone hold.
    content = {f"{name}_sha256": digest(split) for name, split in splits.items()}
    content["code"] = code_digests()
    runs = {}
    for seed in seeds:
        identity = {**asdict(settings), "seed": seed, "llm_sha256": llm.fingerprint, **content}
        runs[Path(settings.out, str(seed))] = identity
    if settings.overwrite:
        discard(runs)
    records = []
    for folder, identity in runs.items():
        with locked(folder):
            records.append(train_run(settings, identity, llm, tokenizer, splits))
    write_table(Path(settings.out))
    if len(records) > 1:
        summarize(records)


if __name__ == "__main__":
    run_program(main, CheckpointError, AdapterError)
