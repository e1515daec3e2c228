"""``slow_optimizers.py SCRIPT``: runs a script whose optimizers take their time, so that it can be killed in the middle."""

import runpy
import sys
import time

from torch.optim.optimizer import register_optimizer_step_post_hook

if __name__ == "__main__":
    register_optimizer_step_post_hook(lambda *_: time.sleep(0.02))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
