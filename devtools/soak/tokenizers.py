"""What ComfyUI's tokenizer of CLIP leaves behind each time it is made, without this pack: python -m
devtools.soak.tokenizers"""
import gc

import comfy.sd1_clip
import psutil

ROUNDS = 16

if __name__ == "__main__":
    sizes = []
    for _ in range(ROUNDS):
        comfy.sd1_clip.SD1Tokenizer()
        while gc.collect():
            pass
        sizes.append(psutil.Process().memory_info().rss / 1e6)
    print(
        f"Done: resident memory {sizes[1]:.0f} MB after 2 tokenizers, {sizes[-1]:.0f} MB after"
        f" {ROUNDS}, none of them kept: {(sizes[-1] - sizes[1]) / (ROUNDS - 2):.1f} MB each")
