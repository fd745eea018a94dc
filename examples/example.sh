# Sourced by the launch scripts, with their arguments: NAME [OVERRIDE...], in the repository's root. Sets
#   config     examples/NAME.yaml
#   ranks      as many as its first line names, or $RANKS
#   overrides  what is left, for pretrain
#   bin        where python and the launchers are: $BIN, or .venv/bin, absolute, as the other hosts have no PATH of yours

fail() { echo "error: $*" >&2; exit 2; }

(($#)) || fail "name an example: $(basename -as .yaml examples/*.yaml | xargs)"
config=examples/$1.yaml
[[ -f $config ]] || fail "there is no example $1; there are $(basename -as .yaml examples/*.yaml | xargs)"
overrides=("${@:2}")
ranks=${RANKS:-$(sed -En '1s/^# ranks: ([0-9]+).*/\1/p' "$config")}
bin=${BIN:-$PWD/.venv/bin}
[[ -d $bin ]] || fail "$bin is not there: run make setup, or set BIN to the absolute path of your environment's bin"

# have NUMBER WHAT: ends the script where that is not what the example needs
have() {
    (($1 == ranks)) || fail "$config is for $ranks ranks, and $2 make $1: change one of them, or say RANKS=$1"
}
