"""stub"""


def run_pretrained(folder, config, device): ...
