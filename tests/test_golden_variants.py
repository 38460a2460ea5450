"""Every model variant gives the logits that it gave before blocks became values, with the same parameters."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks
from tests import demo, light

FILE = np.load(Path(__file__).parent / "golden" / "variants.npz")
VARIANTS = json.loads(str(FILE["variants"]))
RENAMED = {
    "bridge/embeddings": "blocks/bea/bridges",
    "item/bridge_query": "blocks/bea/query",
    "item/memory_query": "blocks/linear_memory/query",
    "user/memory_key": "blocks/linear_memory/key",
    "item/cross_query": "blocks/cross_attention/query",
    "item/target_query": "blocks/target_attention/query",
    "interaction/first/kernels/user": "head/first/kernels/tower/user",
    "interaction/first/kernels/item": "head/first/kernels/tower/item",
    "interaction/first/kernels/product": "head/first/kernels/tower/product",
    "interaction/first/kernels/bridge": "head/first/kernels/bea/read",
    "interaction/first/kernels/lsh_mean": "head/first/kernels/lsh_din/mean",
    "interaction/first/kernels/lsh_deviation": "head/first/kernels/lsh_din/deviation",
    "interaction/first/kernels/learned_mean": "head/first/kernels/linear_memory/mean",
    "interaction/first/kernels/learned_deviation": "head/first/kernels/linear_memory/deviation",
    "interaction/first/kernels/sim_category": "head/first/kernels/sim_category/read",
    "interaction/first/kernels/sim_category_flags": "head/first/kernels/sim_category/flags",
    "interaction/first/kernels/sim_item": "head/first/kernels/sim_item/read",
    "interaction/first/kernels/sim_item_flags": "head/first/kernels/sim_item/flags",
    "interaction/first/kernels/cross": "head/first/kernels/cross_attention/read",
    "interaction/first/kernels/target": "head/first/kernels/target_attention/read",
    "interaction/first/kernels/target_mean": "head/first/kernels/target_attention/mean",
    "interaction/matching/popularity": "blocks/dot_product/popularity",
    "interaction/popularity": "blocks/dot_product/popularity",
    "interaction/bias": "head/bias",
    "interaction": "head",
}
"""Old path to new path, the longest that fits counts; others are as they were."""


@blocks.block
class CosineTiers(blocks.SimTier):
    """Tiers of the cosines of content, which the models of exact attention had beside it."""

    per_item = ("table",)
    tables = ()

    def fit(self, items, config, *, seed):
        return {"table": jnp.asarray(items.content)}

    def user(self, params, user):
        counted = [user.long.mask & (self.group(user.long, user.config) == g) for g in range(self.groups(user.config))]
        return {"content": params["table"][user.long.item], "counted": jnp.stack(counted)}

    def item(self, params, item):
        return params["table"][item.features.ids["item"]]

    def score(self, params, state, rows, kernels):
        past = state.blocks[self.name]
        tier = ((1.0 + rows.blocks[self.name] @ past["content"].T) / 2.0 * self.tiers).astype(jnp.int32)
        of_tier = jax.nn.one_hot(jnp.clip(tier, 0, self.tiers - 1), self.tiers)
        counts = jnp.einsum("clt,gl->cgt", of_tier, past["counted"].astype(jnp.float32))
        return blocks.HeadInputs(rest=jnp.log1p(counts).reshape(len(counts), -1) @ kernels["tiers"])


def config_of(changes: dict) -> aif.Config:
    """The block list that the old switches described."""
    old = {"bridges": 4, "memory": ["lsh", "learned"], "memory_keys": "linear", "sim_fields": ["category"], "simtier": "exact"}
    old |= {"tiers": 4, "tier_windows": [], "signature_bits": 32, "memory_width": 8, "architecture": "aif"} | changes
    sizes = {name: old[name] for name in ("sequence", "item_content") if name in old}
    sizes |= {new: tuple(old[name]) for new, name in (("towers", "tower_hidden"), ("head", "head_hidden")) if name in old}
    dots, tiers = old.get("matching", False), {"tiers": old["tiers"], "by_action": old.get("tiers_by_action", False)}
    tiers["windows"] = tuple(old["tier_windows"])
    sims = [blocks.Sim(field, slots=4, length=3) for field in old["sim_fields"]]
    direct = [blocks.DotProduct()] if dots else []
    if old["architecture"] == "two_tower":
        return demo.config(**sizes, head=(), blocks=(blocks.DotProduct(),))
    if old["architecture"] == "exact":
        attention = [blocks.CrossAttention(dot_product=dots), blocks.TargetAttention(dot_product=dots)]
        return demo.config(**sizes, blocks=(*attention, *sims, CosineTiers(**tiers), *direct))
    made: list = [blocks.Bea(old["bridges"], dot_product=dots)] if old["bridges"] else []
    if "lsh" in old["memory"]:
        made.append(blocks.LshDin(old["signature_bits"]))
    if "learned" in old["memory"]:
        made.append(blocks.LinearMemory(old["memory_width"], keys=old["memory_keys"], dot_product=dots))
    made += sims
    if old["simtier"] == "exact":
        made.append(blocks.SimTier(bits=old["signature_bits"], **tiers))
    return demo.config(**sizes, blocks=(*made, *direct))


def renamed(path: str, tiers: str | None) -> list[str]:
    """New paths of an old parameter: several where blocks that shared it own one each."""
    if path == "interaction/first/kernels/tiers":
        return [f"head/first/kernels/{tiers}/tiers"]
    if path.startswith("item/query/"):
        return [path.replace("item", f"blocks/sim_{field}", 1) for field in ("category", "item")]
    prefixes = [old for old in RENAMED if path == old or path.startswith(f"{old}/")]
    best = max(prefixes, key=len, default=None)
    return [path if best is None else RENAMED[best] + path[len(best) :]]


def params_of(name: str, config: aif.Config) -> dict:
    """The old parameters under their new names; a parameter that is missing or left over fails."""
    variant = VARIANTS[name]
    tiers = next((b.name for b in config.blocks if "tiers" in b.widths(config)), None)
    old: dict = {}
    for path, key in variant["params"].items():
        for new in renamed(path, tiers):
            *groups, last = new.split("/")
            inner = old
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[last] = jnp.asarray(FILE[key].astype(np.float32))
    fitted = {key: jnp.asarray(FILE[value]) for key, value in variant["frozen"].items()}
    made: dict = {"fields": {"category": jnp.asarray(FILE["inputs/category"])}}
    if variant["signatures"] is not None:
        bits = fitted["projection"].shape[1]
        made[f"signatures_{bits}"] = fitted | {"table": jnp.asarray(FILE[variant["signatures"]])}
    if "content" in fitted:
        content = fitted["content"]
        made["cosine_tiers"] = {"table": content / jnp.maximum(jnp.linalg.norm(content, axis=1, keepdims=True), 1e-6)}
    like = jax.eval_shape(lambda key: aif.build(config).init(key, items(None)), jax.random.key(0))
    whole = {group: old.get(group, {}) for group in ("embedding", "user", "item", "blocks", "head")} | {"fitted": made}
    drop = [block for block in whole["blocks"] if block not in like["blocks"]]
    whole["blocks"] = {name: part for name, part in whole["blocks"].items() if name not in drop}
    if config.head and "dot_product" not in like["blocks"]:
        assert "matching" not in whole["head"]
    assert all(name.startswith("sim_") for name in drop), drop
    whole["head"].pop("matching", None)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(lambda leaf: leaf.shape, like)
    return whole


def items(rows: np.ndarray | None) -> aif.ItemFeatures:
    """Rows of the golden catalogue, all of them for None."""
    rows = np.arange(50) if rows is None else rows
    category, tags, floats, content, bid = (FILE[f"inputs/{n}"][rows] for n in ("category", "tags", "floats", "content", "bid"))
    ids = {"item": rows.astype(np.int32), "category": category, "tags": tags}
    return aif.ItemFeatures(ids=ids, floats=floats, content=content, side={"bid": bid})


def users() -> aif.UserFeatures:
    """The four golden users."""
    history = aif.Behaviours(**{name: FILE[f"inputs/history_{name}"] for name in ("item", "action", "age", "mask")})
    ids = {"gender": FILE["inputs/user_gender"], "interests": FILE["inputs/user_interests"]}
    return aif.UserFeatures(ids=ids, floats=FILE["inputs/user_floats"], history=history)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_switches(name):
    config = config_of(VARIANTS[name]["config"])
    model, params = aif.build(config), params_of(name, config)

    def logits(params, users, many, few):
        joint = jax.vmap(model.joint, (None, 0, None))
        states = jax.vmap(model.user, (None, 0))(params, users)
        rows = jax.vmap(model.item, (None, 0))(params, many)
        staged = jax.vmap(model.interaction, (None, 0, None))(params, states, rows)
        return {"logits": joint(params, users, many), "few": joint(params, users, few), "staged": staged}

    inputs = (params, users(), items(FILE["inputs/candidates"]), items(FILE["inputs/few"]))
    # each program runs once: compile it fast instead of making it fast
    run = jax.jit(logits).lower(*inputs).compile(light.options())
    for form, got in run(*inputs).items():
        np.testing.assert_allclose(got, FILE[f"{form}/{name}"], atol=1e-6, rtol=1e-6, err_msg=form)
