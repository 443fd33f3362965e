"""Conditioning for class-conditional models."""

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.imagenet import class_number, names
from .adapters.compat import Schema
from .adapters.network import class_label


class TiMClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMClassLabel",
            display_name="TiM ImageNet Class",
            category="TiM",
            description="An ImageNet class as conditioning, for class-conditional TiM models. An empty label is the null class.",
            search_aliases=["class label", "imagenet", "c2i", "transition models"],
            inputs=[
                io.String.Input(
                    "label",
                    default="golden retriever",
                    tooltip="Name or number of one of the 1000 ImageNet classes: golden retriever, or 207. Leave it empty for the null "
                    "class, used as the negative.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="For the positive or negative input of a sampler.")],
        )

    @classmethod
    def execute(cls, label) -> io.NodeOutput:
        number = class_number(label)
        if number >= len(names()):
            raise TimError(f"label: {number} is not an ImageNet class; choose 0 to {len(names()) - 1}, or a name")
        return io.NodeOutput([[class_label(number), {}]])
