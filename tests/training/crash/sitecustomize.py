"""Python runs this at start-up where its folder is on PYTHONPATH: makes CRASHING_RANK fail, or
LOOPING_RANK loop, in its third step."""

import importlib.util
import os
import sys

NAME = "megatron_stable.engine.engine"


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(Finder)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            original = module.Engine.train_step

            def train_step(self, step, *args):
                if step == 3 and is_one_of("LOOPING_RANK"):
                    loop()
                if step == 3:
                    raise ArithmeticError("the weights are lost")
                return original(self, step, *args)

            module.Engine.train_step = train_step

        spec.loader.exec_module = execute_and_patch
        return spec


def loop():
    while True:
        pass


def is_one_of(which):
    return "RANK" in os.environ and os.environ["RANK"] in os.environ.get(which, "").split(",")


if is_one_of("CRASHING_RANK") or is_one_of("LOOPING_RANK"):
    sys.meta_path.insert(0, Finder)
