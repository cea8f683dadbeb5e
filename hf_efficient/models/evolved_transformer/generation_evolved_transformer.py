"""Generation with an Evolved Transformer: its cache, and what is refused before work starts."""

from typing import Any

from transformers import GenerationMixin

from .cache_evolved_transformer import check_cache, new_cache


class EvolvedTransformerGenerationMixin(GenerationMixin):
    """transformers' `generate`, with an `EvolvedTransformerCache`; no other cache can hold the convolutions' state."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let `generate` use the model's own cache, and refuse others."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} has no place for what the "
                "convolutions look back to; leave it out, and an EvolvedTransformerCache is used."
            )
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={generation_config.assistant_early_exit} is not possible: what comes out of an "
                "earlier block was not trained to be read; pass assistant_model, or prompt_lookup_num_tokens."
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            model_kwargs["past_key_values"] = check_cache(given, self.config)
        if generation_config.use_cache is False or given is not None:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        model_kwargs["past_key_values"] = new_cache(self.config)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """What `generate_batch` begins with: refused, since its rows hold several texts one behind the other."""
        raise ValueError(
            "generate_batch packs several texts into a row, and the convolutions would look across their borders; "
            "pad them on the left and call generate."
        )


__all__ = ["EvolvedTransformerGenerationMixin"]
