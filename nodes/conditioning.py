"""What a class-conditional model is told to draw."""

from comfy_api.latest import io

from ..tim_core.imagenet import class_number
from .adapters.compat import Schema
from .adapters.model import class_label


class TiMClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMClassLabel",
            display_name="TiM Class Label",
            category="TiM",
            description="A class of ImageNet as conditioning, for the class-conditional TiM models. An empty label is the null class.",
            search_aliases=["transition models", "imagenet", "c2i", "class"],
            inputs=[
                io.String.Input(
                    "label",
                    default="golden retriever",
                    tooltip="A name or number of ImageNet's 1000 classes: golden retriever, or 207. Empty: no class, which is the "
                    "negative of guidance.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="For the positive or negative of a sampler.")],
        )

    @classmethod
    def execute(cls, label) -> io.NodeOutput:
        return io.NodeOutput([[class_label(class_number(label)), {}]])
