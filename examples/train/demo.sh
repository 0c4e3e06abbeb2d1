#!/bin/sh
# Train moe-tiny on books, from nothing to readable words. What is done already is not done again.
#   demo.sh [FOLDER]     default runs/train-demo; hayate is taken from the PATH
set -eu
here=$(dirname "$0")
out=${1:-runs/train-demo}
last=$out/run/step-00001000

show() {
    echo "\$ $*"
    "$@"
}

if [ ! -d "$last" ]; then
    books=$(hayate data fetch books)
    mkdir -p "$out/text"  # the prose among them: Austen, Bryant, Burgess, Carroll, Chesterton, Edgeworth
    cp "$books"/austen-* "$books"/b[ru]* "$books"/c* "$books"/e* "$out/text"
    [ -f "$out/tokenizer/tokenizer.json" ] ||
        show hayate tokenizer train "$out/text" --vocab-size 4096 --output "$out/tokenizer"
    # A tenth of the books, which comes to one of them, Emma, is held out.
    [ -f "$out/data/train.safetensors" ] ||
        show hayate data prepare "$out/text" --tokenizer "$out/tokenizer" --output "$out/data" --held-out 0.1
    set -- "$here/moe-tiny.toml" --data "$out/data" --output "$out/run"
    for checkpoint in "$out"/run/step-*; do
        [ ! -d "$checkpoint" ] || set -- "$@" --resume
        break
    done
    show hayate train "$@"
    show hayate plot "$out/run"
else
    echo "$last is there: the training is done; remove $out to begin again"
fi
show hayate generate --model "$last" --prompt "The old man" --max-tokens 80 --temperature 0.7 --seed 1
