"""A class of `transformers` for what it has none for: `import megatron_stable.hf`, and its Auto classes know it.

Nothing that is downloaded runs: the code is this package's, `trust_remote_code` is not needed.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ModuleNotFoundError as missing:
    if missing.name != "transformers":
        raise
    raise ModuleNotFoundError("transformers is missing: pip install 'megatron-stable[hf]'", name=missing.name) from None

from megatron_stable.hf.configuration import MegatronStableConfig
from megatron_stable.hf.modeling import MegatronStableForCausalLM, MegatronStableModel

__all__ = ["MegatronStableConfig", "MegatronStableForCausalLM", "MegatronStableModel"]

AutoConfig.register("megatron_stable", MegatronStableConfig, exist_ok=True)
AutoModelForCausalLM.register(MegatronStableConfig, MegatronStableForCausalLM, exist_ok=True)
