"""Train the adapter; the backbone stays frozen.

    python train.py                                             the demo: no download, no GPU, about a minute
    python train.py --data meld --llm PATH [--data-dir DIR]     a data set and a backbone
    python train.py --seeds 1111 2222 3333 4444 5555            the paper's protocol, with a table at the end
    python train.py -h                                          every setting

Each seed has its own folder, OUT/SEED: settings.json, log.jsonl (a line per epoch) and curves.svg,
adapter.safetensors (the best epoch by validation) and features.json (the training features' range),
predictions.csv and metrics.json (the test split), and last of all results.json. The same command again
continues what was interrupted, to the same bytes; finished runs are left alone.
"""
import argparse
import hashlib
import io
import json
import math
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from adapter import MODALITIES, AdapterConfig, MSEAdapter, MultimodalLLM, save_adapter
from data import FEATURES, HERE, SPLITS, TASKS, Split, collate, divide, epoch_rows, find_data, find_llm
from data import load_split, load_tokenizer, preset, some_rows
from eval import DECODE, READOUT, ablation, alarms, evaluate, evaluate_all, feature_range, way
from extras.baseline import prompt_alone
from extras.check import check_task
from extras.files import read_json, write_atomic
from extras.guards import check_device, compare, locked, uninterrupted
from extras.report import METHOD, curves, recorded, summarize, write_results
from model import Config, load_llm

# The release's, for every task and family.
WARMUP = 0.1                # share of all steps in which the learning rate climbs from 0
WEIGHT_DECAY = 0.01
ADAM_EPS = 1e-4

# --- Settings -----------------------------------------------------------------------------------------------
def setting(kind, default, about: str, choices=None):
    """A field of Settings; its metadata is what argparse wants to know."""
    if kind is bool:
        return field(default=default, metadata={"action": "store_true", "help": about})
    if default is not None:
        about += f" [{default}]"
    return field(default=default, metadata={"type": kind, "help": about, "choices": choices})

def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)

def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)

@dataclass
class Settings:
    """Everything that shapes a run. None: the release's value for task and family (`preset` in data.py)."""
    data: str = setting(str, "demo", "task", TASKS)
    data_dir: str | None = setting(str, None, "folder with the published files somewhere below")
    llm: str | None = setting(str, None, "backbone: a checkpoint folder or a hub name")
    out: str | None = setting(str, None, "folder of the runs, one subfolder per seed [runs/DATA-LLM]")
    seeds: list[int] = field(default_factory=lambda: [1111], metadata={
        "type": int, "nargs": "+", "help": "train once for each; the paper's are 1111 2222 3333 4444 5555"})
    official: bool = setting(bool, False, "rows, losses and answers as in the release, quirks included")

    learning_rate: float | None = setting(float, None, "peak of the schedule")
    batch_size: int | None = setting(count, None, "rows per step")
    epochs: int | None = setting(count, None, "length of the cosine, at whose end the learning rate is 0")
    max_epochs: int | None = setting(count, None, "end here at the latest [epochs]")
    patience: int | None = setting(count, None, "epochs without a better validation score to stop after")
    pseudo_tokens: int | None = setting(count, None, "P")
    audio_hidden: int | None = setting(count, None, "width of the audio LSTM's state")
    video_hidden: int | None = setting(count, None, "width of the video LSTM's state")
    no_mixer: bool = setting(bool, False, "ablation: add the modalities, without the text's product")
    no_fusion: bool = setting(bool, False, "ablation: one linear layer instead of Multi-Scale-Fusion")
    modality: str = setting(str, "both", "ablation: what the adapter gets", MODALITIES)
    independent_tokens: bool = setting(bool, False, "pseudo tokens of their own, no copies of one vector")
    train_share: float = setting(share, 1.0, "train with this share of the rows, drawn by the seed")
    valid_share: float = setting(share, 0.0, "validate with this share of the training rows, drawn by the "
                                        "seed, where there is no valid split")
    prompt_alone: bool = setting(bool, False, "no training, no tokens: print what the frozen backbone scores")

    decode: str = setting(str, "greedy", "how answers are read when epochs are compared and tested", DECODE)
    readout: str = setting(str, "mean", "an intensity under --decode labels", READOUT)
    eval_batch: int = setting(count, 32, "rows at a time when answering")
    recompute: int | None = setting(int, None, "blocks that compute their activations again in backward, "
                                    "which saves memory [on a GPU as few as fit, on a CPU none]")
    device: str = setting(str, "auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    dtype: str = setting(str, "auto", "of the backbone", ("auto", "float32", "bfloat16", "float16"))
    overwrite: bool = setting(bool, False, "discard what the run's folder holds")
    download: bool = setting(bool, False, "fetch data set and backbone if they are not here")

def parse_settings(argv=None) -> Settings:
    """The command line, made from the dataclass: --batch-size 8, --official."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        parser.add_argument("--" + f.name.replace("_", "-"), **f.metadata)
    return Settings(**vars(parser.parse_args(argv)))

def resolve(settings: Settings, family: str) -> Settings:
    """Fill in what was left to the release's presets and to the machine."""
    task, gpu = TASKS[settings.data], torch.cuda.is_available()
    values = {**preset(task, family)._asdict(), "patience": 8 if task.labels else 10}
    values |= {name: value for name, value in asdict(settings).items() if value is not None}
    values.setdefault("max_epochs", values["epochs"])
    mode = "-official" if settings.official else ""
    values.setdefault("out", f"runs/{task.name}-{Path(settings.llm or task.llm).name}{mode}")
    if settings.device == "auto":
        values["device"] = "cuda" if gpu else "cpu"
    else:
        check_device(settings.device)
    if settings.dtype == "auto":
        bf16 = gpu and torch.cuda.is_bf16_supported()
        values["dtype"] = default_dtype(values["device"], settings.official, bf16)
    return Settings(**values)

def default_dtype(device: str, official: bool, bf16_supported: bool) -> str:
    """The backbone's. The release runs it in float16."""
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if bf16_supported and not official else "float16"

# --- One step -----------------------------------------------------------------------------------------------
def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """1) climb from 0 over the first `warmup` of all steps, 2) fall along a cosine to 0, 3) stay there.

    (In the release the cosine climbs again past its end.)
    """
    climb = steps * warmup
    if step < climb:
        return peak * step / max(1, climb)
    if step < steps:
        return peak * 0.5 * (1 + math.cos(math.pi * (step - climb) / max(1, steps - climb)))
    return 0.0

def make_optimizer(net: MultimodalLLM):
    return torch.optim.AdamW(net.adapter.parameters(), eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)

def share_of(split: Split, part: float, seed: int) -> Split:
    """A random `part` of the rows; a smaller one lies within a larger one of the same seed."""
    order = np.random.RandomState(seed).permutation(len(split))
    return some_rows(split, sorted(order[:max(1, round(part * len(split)))]))

def train_step(net: MultimodalLLM, optimizer, scaler, batch, recompute: int = 0):
    """One step of AdamW on one batch; returns the mean loss of its rows, on the device."""
    optimizer.zero_grad()
    loss = net.loss(batch, recompute)
    if loss.device.type == "cpu":           # on a GPU each look would make the step wait: train_epoch looks
        check_finite(loss.detach(), net)
    scaler.scale(loss).backward()           # the scaler acts for a float16 backbone only
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()

def check_finite(loss, net: MultimodalLLM):
    """Raises ValueError that names the first tensor of the adapter that is not finite, if the loss is not."""
    if not math.isfinite(loss):
        broken = [name for name, p in net.adapter.named_parameters() if not p.isfinite().all()]
        broken.append("what the backbone makes of the pseudo tokens")
        raise ValueError(f"the loss is {float(loss)}: first not finite: {broken[0]}; the last good adapter "
                         "is kept, try a smaller --learning-rate or --dtype float32")

def kept_by_block(c: Config) -> int:
    """Numbers per token that a frozen block keeps for backward; fewer where heads share keys and values."""
    # Linear layers keep nothing, for no weight trains.
    norms = 2 * c.dim                           # their inputs
    attention = 6 * c.n_head * c.head_dim       # q and k, turned; qkv, of which v is a part; the output
    mlp = 3 * c.ffn_dim                         # gate, silu(gate), up
    return norms + attention + mlp

def plan_recompute(net: MultimodalLLM, train: Split, settings: Settings) -> int:
    """How many blocks recompute: as few as let the longest rows fit four fifths of a GPU's free memory."""
    layers, blocks = net.llm.config.n_layer, settings.recompute or 0
    longest = sorted(range(len(train)), key=lambda row: -len(train.text[row]))[:settings.batch_size]
    with torch.no_grad():
        x = net.rows(collate(train, longest))[0]      # (B, S, C)
    plain = x[..., 0].nbytes * kept_by_block(net.llm.config)
    least = x.nbytes                                    # a block that recomputes keeps its input alone
    if settings.recompute is None and x.is_cuda:
        excess = layers * plain - 0.8 * torch.cuda.mem_get_info(x.device)[0]
        blocks = max(0, math.ceil(excess / (plain - least)))
    blocks, weights = min(blocks, layers), sum(p.nbytes for p in net.llm.parameters())
    weights, plain, least = (f"{size / 2**30:.2f} GiB" for size in (weights, layers * plain, layers * least))
    print(f"memory: weights {weights}, activations {plain} without and {least} with recomputation: "
          f"{blocks} of {layers} blocks recompute", flush=True)
    return blocks

# --- A run: its state, and the loop -------------------------------------------------------------------------
class Run:
    """One seed's training: what takes part, and how far it is."""

    def __init__(self, settings: Settings, seed: int, llm, tokenizer, train: Split):
        s, task = settings, TASKS[settings.data]
        self.settings, self.seed, self.task, self.folder = s, seed, task, Path(s.out, str(seed))
        config = AdapterConfig(
            llm.config.dim, train.audio[0].shape[1], train.video[0].shape[1], s.audio_hidden, s.video_hidden,
            s.pseudo_tokens, no_mixer=s.no_mixer, no_fusion=s.no_fusion, modality=s.modality,
            independent_tokens=s.independent_tokens)
        with torch.random.fork_rng(devices=[]):             # the adapter's start depends on the seed alone
            torch.manual_seed(seed)
            adapter, best = MSEAdapter(config).to(s.device), MSEAdapter(config).to(s.device)
        self.net = MultimodalLLM(llm, adapter, tokenizer, task, s.official)
        self.best = MultimodalLLM(llm, best, tokenizer, task, s.official)   # with the best epoch's adapter
        self.optimizer = make_optimizer(self.net)
        self.scaler = torch.amp.GradScaler(torch.device(s.device).type, enabled=s.dtype == "float16")
        self.parts = (adapter, best, self.optimizer, self.scaler)           # whatever has a state
        self.log = []               # an entry per finished epoch
        self.step = 0               # steps taken in the epoch under way
        self.loss_sum = 0.0         # over those steps; a tensor, so that no step waits for the GPU
        self.began = time.time()

    def best_epoch(self) -> int:
        """Counted from 1; 0 if there is none yet."""
        scores = [entry[f"valid_{self.task.select}"] for entry in self.log]
        best = max if self.task.labels else min             # a weighted F1 or an MAE
        return scores.index(best(scores)) + 1 if scores else 0

    def save(self):
        """Write state-EPOCH-STEP-SHA256.pt, and keep the one before it. The name proves the content."""
        buffer = io.BytesIO()
        states = [part.state_dict() for part in self.parts]
        torch.save([states, self.log, self.step, self.loss_sum, time.time() - self.began], buffer)
        data = buffer.getvalue()
        name = f"state-{len(self.log):04d}-{self.step:06d}-{hashlib.sha256(data).hexdigest()}.pt"
        write_atomic(self.folder / name, data)
        for old in sorted(self.folder.glob("state-*"))[:-2]:
            old.unlink()

    def load(self):
        """Put the newest undamaged state back, if there is a state. Raises ValueError if all are damaged."""
        files = sorted(self.folder.glob("state-*"))
        while files and not files[-1].stem.endswith(hashlib.sha256(files[-1].read_bytes()).hexdigest()):
            file = files.pop()
            print(f"{file}: damaged (its sha256 is not the one in its name), using the state before it")
            if not files:
                raise ValueError(f"{self.folder}: no undamaged state is left; start again with --overwrite")
        if not files:
            return
        loaded = torch.load(files[-1], map_location="cpu", weights_only=True)
        states, self.log, self.step, self.loss_sum, seconds = loaded
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)
        self.began -= seconds
        print(f"continuing after epoch {len(self.log)}, step {self.step}", flush=True)

def fit(run: Run, train: Split, valid: Split):
    """Train until the epochs or the patience run out. Leaves the best adapter in run.best and the folder."""
    s = run.settings
    recompute = plan_recompute(run.net, train, s)
    run.load()
    publish(run)
    try:
        while len(run.log) < s.max_epochs and len(run.log) - run.best_epoch() < s.patience:
            # 1) what is left of the epoch's steps
            train_epoch(run, train, recompute)
            # 2) validate
            result = evaluate(run.net, valid, s.eval_batch, s.decode, s.readout)
            with uninterrupted():
                # 3) keep the best epoch's adapter
                run.log.append({
                    "epoch": len(run.log) + 1, "loss": float(run.loss_sum) / run.step,
                    "learning_rate": run.optimizer.param_groups[0]["lr"],
                    **{f"valid_{name}": value for name, value in result.scores.items()},
                    "valid_unparsed": result.unparsed, "seconds": round(time.time() - run.began, 2)})
                run.step, run.loss_sum = 0, 0.0
                if run.best_epoch() == len(run.log):
                    run.best.adapter.load_state_dict(run.net.adapter.state_dict())
                # 4) write it down, the state first: all else follows from it
                run.save()
                publish(run)
            tell(run, result, valid)
    except KeyboardInterrupt:
        with uninterrupted():
            run.save()
        raise

def train_epoch(run: Run, train: Split, recompute: int):
    """The steps that the epoch still has."""
    s, epoch = run.settings, len(run.log)
    order = epoch_rows(len(train), s.batch_size, run.seed, epoch)       # a function of (seed, epoch) alone
    steps, title = len(order), f"epoch {epoch + 1}"
    bar = tqdm(order[run.step:], title, initial=run.step, total=steps, leave=False, disable=None)
    for rows in bar:
        with uninterrupted():
            rate = learning_rate(epoch * steps + run.step, s.epochs * steps, WARMUP, s.learning_rate)
            run.optimizer.param_groups[0]["lr"] = rate
            loss = train_step(run.net, run.optimizer, run.scaler, collate(train, rows), recompute)
            run.loss_sum = run.loss_sum + loss.double()
            run.step += 1
        if run.step % 20 == 0 or run.step == steps:
            check_finite(run.loss_sum, run.net)
            bar.set_postfix(loss=f"{run.loss_sum / run.step:.4f}", lr=f"{rate:.1e}", refresh=False)

# --- What is left of a run, and of several ------------------------------------------------------------------
def tell(run: Run, result, valid: Split):
    """One line for the epoch, and an alarm where something looks wrong."""
    now, best = run.log[-1], ""
    if run.best_epoch() == len(run.log):
        best = ", best yet"
    print(f"epoch {now['epoch']}/{run.settings.max_epochs}: loss {now['loss']:.4f}, valid {result.line()}, "
          f"{now['seconds']:.0f} s so far{best}")
    for alarm in alarms(result):
        print(alarm)
    unparsed = [entry["valid_unparsed"] for entry in run.log[-2:]]
    if unparsed[-1] > unparsed[0] + 0.01 * len(valid):
        print(f"more answers do not parse: {unparsed[0]} before, {unparsed[-1]} now")
    sys.stdout.flush()

def publish(run: Run):
    """Write the log, the curves and the best adapter. All of it is made again from the state."""
    if run.log:
        log = "".join(json.dumps(entry) + "\n" for entry in run.log)
        write_atomic(run.folder / "log.jsonl", log.encode())
        write_atomic(run.folder / "curves.svg", curves(run.log, run.task.select, run.best_epoch()).encode())
        save_adapter(run.folder / "adapter.safetensors", run.best)

WRITTEN = ("results.json", "state-*", "adapter.safetensors", "log.jsonl", "curves.svg", "predictions*.csv",
           "metrics*.json", "features.json", "settings.json")

def train_run(settings: Settings, identity: dict, llm, tokenizer, splits: dict) -> dict:
    """Train one seed, pick the best epoch, test once with it. Returns the record that results.json holds.
    identity: what settings.json holds, the seed and the content of backbone and data with the settings."""
    seed = identity["seed"]
    train, valid = splits["train"], splits.get("valid")
    if settings.valid_share:
        train, valid = divide(train, settings.valid_share, seed)
    train = share_of(train, settings.train_share, seed)
    folder = Path(settings.out, str(seed))
    if settings.overwrite:
        remove(folder, *WRITTEN)
    compare(folder / "settings.json", identity)
    if (folder / "results.json").is_file():
        record = read_json(folder / "results.json", ("seed", "family", "data", "line"))
        if not all(isinstance(value, str | int | float) for value in record.values()):
            raise ValueError(f"{folder / 'results.json'}: damaged; train again with --overwrite")
        print(f"seed {seed}: finished before, left alone (--overwrite discards it); test {record['line']}")
    else:
        write_atomic(folder / "settings.json", json.dumps(identity, indent=1).encode())
        write_atomic(folder / "features.json", json.dumps(feature_range(train)).encode())
        run = Run(settings, seed, llm, tokenizer, train)
        trainable, frozen = (sum(p.numel() for p in part.parameters()) for part in (run.net.adapter, llm))
        print(f"seed {seed}: {trainable:,} parameters train, {frozen:,} are frozen")
        fit(run, train, valid)
        record = test(run, splits["test"])
        write_atomic(folder / "results.json", json.dumps(record, indent=1).encode())
        print(f"wrote {folder}")
    remove(folder, "state-*", ".*.new")     # nothing is left to continue
    return record

def test(run: Run, split: Split) -> dict:
    """Answer the test split with the best epoch's adapter, in all ways of decoding. Returns the record."""
    s = run.settings
    results = evaluate_all(run.best, split, s.eval_batch, s.decode, s.readout)
    write_results(run.folder, split, results)
    result = results[way(run.task, s.decode, s.readout)]    # the others: in metrics.json and predictions.csv
    print(f"test (best epoch {run.best_epoch()}): {result.line()}", flush=True)
    for alarm in alarms(result):
        print(alarm)
    if s.modality != "text":
        for line in ablation(run.best, split, s.eval_batch, s.decode, s.readout):
            print(line, flush=True)
    backbone, family = Path(s.llm or run.task.llm).name, run.net.llm.config.family
    peak = torch.cuda.max_memory_allocated(s.device) if s.device.startswith("cuda") else 0
    return {"seed": run.seed, "backbone": backbone, "family": family,
            "data": s.data, "official": s.official, "device": s.device, "dtype": s.dtype,
            **{name: getattr(s, name) for name in METHOD},
            **{f"test_{name}": value for name, value in result.scores.items()},
            "test_rows": len(split), "test_unparsed": result.unparsed, "line": result.line(),
            "best_epoch": run.best_epoch(), "epochs": len(run.log), "seconds": run.log[-1]["seconds"],
            "gpu_gib": round(peak / 2**30, 2), "torch": torch.__version__}

def remove(folder: Path, *patterns: str):
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()

def digest(split: Split) -> str:
    """Of all texts, labels, lengths and features: some seconds for gigabytes."""
    seal = hashlib.sha256(repr([split.text, split.label, split.audio_len, split.video_len]).encode())
    for kind in FEATURES:
        for row in range(len(split)):
            seal.update(split.features(kind, row).tobytes())
    return seal.hexdigest()[:16]

def main(argv=None):
    settings = parse_settings(argv)
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, settings.seeds))}: a seed twice; name each seed once")
    task = TASKS[settings.data]
    data_dir, backbone = settings.data_dir or HERE / task.home, settings.llm or task.llm
    if settings.download:
        for split in SPLITS:
            if split != "valid" or not settings.valid_share:
                find_data(task, data_dir, split, fetch=True)
    path = find_llm(backbone, settings.download)
    family = Config.from_dir(path).family
    check_task(task, family)
    splits = {split: load_split(task, data_dir, split) for split in ("train", "test")}
    if not settings.valid_share:
        splits["valid"] = load_split(task, data_dir, "valid")
    elif len(splits["train"]) < 2:
        raise ValueError(f"{data_dir}: one training row cannot be shared; expected at least two")
    widths = {(split.audio[0].shape[1], split.video[0].shape[1]) for split in splits.values()}
    if len(widths) > 1:
        raise ValueError(f"{data_dir}: splits of {widths} audio and video features; expected as many in each")
    tokenizer = load_tokenizer(path)
    settings = resolve(settings, family)
    counts = {name: str(len(splits[name])) for name in SPLITS if name in splits}
    if settings.valid_share:
        train, valid = divide(splits["train"], settings.valid_share, settings.seeds[0])
        counts = {"train": len(train), "valid (drawn from train by the seed)": len(valid), "test": counts["test"]}
    rows = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"{task.name}: {rows} rows; backbone {Path(backbone).name} ({family})")
    chosen = [f"{name} {value}" for name, value in asdict(settings).items() if value not in (None, False)]
    shown = f"settings: {', '.join(chosen)}"
    print(textwrap.fill(shown, 110, subsequent_indent="  ", break_on_hyphens=False), flush=True)
    llm = load_llm(path, settings.device, getattr(torch, settings.dtype))
    if sum(p.numel() for p in llm.parameters()) < 2e6:
        torch.set_num_threads(1)            # tensors this small are done before a second thread wakes up
    if settings.prompt_alone:
        print(prompt_alone(llm, tokenizer, task, splits["test"], settings))
        return
    note = recorded(family, task.name).get("note")
    if note:
        print(f"note: {note}", flush=True)
    content = {"llm_sha256": llm.fingerprint}
    content |= {f"{name}_sha256": digest(split) for name, split in splits.items()}
    records = []
    for seed in settings.seeds:
        identity = {**asdict(settings), "seed": seed, **content}
        with locked(Path(settings.out, str(seed))):
            records.append(train_run(settings, identity, llm, tokenizer, splits))
    summarize(records, Path(settings.out))

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the state is saved, the same command again continues")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
