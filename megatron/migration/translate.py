"""From a run of the original to a config: the table of flags, DeepSpeed's JSON, then the rules."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.config import Config, EngineConfig, config_from_dict
from megatron.config.dotted import nest
from megatron.errors import ConfigError
from megatron.migration.deepspeed_json import take_settings
from megatron.migration.flags import DEFAULTS, FLAGS, Lost, NotNeeded, Same, Switch
from megatron.migration.rules import RULES
from megatron.migration.run import DEFAULT, Migration, Original
from megatron.migration.shell import open_parts, shown
from megatron.migration.values import Notes, Settings


@dataclass(frozen=True)
class Migrated:
    """A config, where each of its options comes from, and what there is to say of it."""

    config: Config
    settings: Settings
    notes: Notes


def translate(original: Original) -> Migrated:
    """The config that is equal to a run of the original.

    Raises:
        ConfigError: if flags contradict each other or DeepSpeed's JSON, if something is missing
            that only a person can tell, or if the options do not fit each other here.
    """
    run = gather(original)
    values = {option: setting.value for option, setting in run.settings.items()}
    try:
        config = config_from_dict(nest(values))
    except ConfigError as error:
        raise ConfigError(f"the flags give a config that is refused: {error}") from error
    if original.world_size is not None:
        _try_layout(run, config, original.world_size)
    if run.uses_deepspeed:
        config = _with_deepspeed(run, config)
    return Migrated(config, run.settings, run.notes)


def gather(original: Original) -> Migration:
    """What flags and JSON say, each for itself; whether it fits together here is not asked.

    Raises:
        ConfigError: as ``translate`` does, but for the last reason.
    """
    run = Migration(original)
    _read_table(run)
    if original.deepspeed is not None:
        run.extra.update(take_settings(original.deepspeed, run.flags, run.settings, run.notes))
    for rule in RULES:
        rule(run)
    if original.commands > 1:
        text = f"the last of {original.commands} that start the training with other flags"
        run.notes.add("different", "the command", text)
    for option, value in DEFAULTS.items():
        if option not in run.settings:
            run.settings.give(option, value, DEFAULT)
    _name_the_rest(run)
    return run


def _try_layout(run: Migration, config: Config, world_size: int) -> None:
    """Note if batches and ranks do not fit each other: here all of a ramp-up must, not a part."""
    try:
        config.layout(world_size)
    except ConfigError as error:
        run.notes.add("to do", f"the layout on {world_size} ranks is refused", str(error))


def _read_table(run: Migration) -> None:
    """Do what the table says of each flag."""
    flags = run.flags
    for name in flags:
        meaning = FLAGS.get(name)
        if isinstance(meaning, Same):
            run.take(name, meaning.option, meaning.read)
        elif isinstance(meaning, Switch):
            if flags.values(name):
                raise ConfigError(f"--{name} has no value, got '{flags.written(name)}'")
            run.settings.give(meaning.option, meaning.value, flags.written(name))
        elif isinstance(meaning, Lost):
            run.lose(name, meaning.why)
        elif isinstance(meaning, NotNeeded):
            run.skip(name, meaning.why)
        elif open_parts(name):
            run.notes.add(
                "to do", flags.written(name), "more flags under a condition; give them after --"
            )
        elif meaning is None:
            run.lose(name, "no flag of Megatron-DeepSpeed that is known here")
    for word in flags.stray:
        if open_parts(word):
            run.notes.add("to do", shown(word), "perhaps more flags; give them after --")
        else:
            run.notes.add("lost", word, "no flag stands before it")


def _name_the_rest(run: Migration) -> None:
    """Name the flags that have decided nothing. The engine is decided last."""
    named = ["--deepspeed", *(setting.source for _, setting in run.settings.items())]
    named += [note.name for note in run.notes.all]
    for name in run.flags:
        if not any(run.flags.written(name) in text for text in named):
            run.skip(name, "other flags decide")


def _with_deepspeed(run: Migration, config: Config) -> Config:
    """The config with DeepSpeed's engine, if that does what is asked for, and with its options."""
    source = run.flags.written("deepspeed")
    why = _refusal(config, {})
    if why is not None:
        run.notes.add("lost", source, f"this project's own engine does it: {why}")
    kept = {}
    for name, value in run.extra.items():
        refusal = "engine.name is torch" if why is not None else _refusal(config, {name: value})
        if refusal is None:
            kept[name] = value
        else:
            reason = refusal.partition(": ")[2] or refusal
            run.notes.add("lost", f"{name} of DeepSpeed's JSON", reason)
    if why is not None:
        return config
    run.settings.give("engine.name", "deepspeed", source)
    if kept:
        assert run.original.deepspeed is not None
        run.settings.give("engine.deepspeed", nest(kept), run.original.deepspeed.place)
    return _on_deepspeed(config, kept)


def _refusal(config: Config, extra: Mapping[str, Any]) -> str | None:
    """Why the config does not take DeepSpeed with some of its own options."""
    try:
        _on_deepspeed(config, extra)
    except ConfigError as error:
        return str(error)
    return None


def _on_deepspeed(config: Config, extra: Mapping[str, Any]) -> Config:
    return replace(config, engine=EngineConfig(name="deepspeed", deepspeed=nest(extra)))
