"""The pack's door: ComfyUI asks `comfy_entrypoint` for the nodes. Nothing is imported before it does."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    try:
        from .nodes import TiMExtension, load_schemas

        load_schemas()
        return TiMExtension()
    except Exception as error:
        import logging

        logging.error(f"ComfyUI-TiM: the nodes could not be loaded ({error}); they need ComfyUI 0.3.64 or newer")
        logging.debug("ComfyUI-TiM", exc_info=True)
        raise
