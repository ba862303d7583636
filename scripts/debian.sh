# How scripts take packages from Debian's archive without touching the system's apt. lib.sh comes first.
# shellcheck shell=bash disable=SC2154
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# The URI of a Debian archive, from the sources that apt has; the labels are known once it has lists.
mirror() {
	local uris
	# shellcheck disable=SC2016  # apt's variables
	uris=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages')
	awk '$1 == "Debian" || $NF ~ /\/debian\/$/ { print $NF; found = 1; exit } END { exit !found }' <<<"$uris"
}

# apt VIEW COMMAND…: an apt command that knows the suites of a view and nothing of the system's sources
apt() {
	local dir=$cache/apt/$1 command=$2
	"$command" -q -o Dir::Etc::SourceList="$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
		-o Dir::State::Lists="$dir/lists" -o Dir::Cache="$dir/cache" \
		-o Acquire::Languages=none -o APT::Sandbox::User=root "${@:3}"
}

# view NAME SUITE…: makes a view and loads its package lists. Their signatures are checked: the
# keyring of Debian 12 holds the keys of the later releases since 2023.3+deb12u1.
view() {
	local dir=$cache/apt/$1 uri
	[ -f $keyring ] || fail "Debian's keys are missing; run scripts/deps vm"
	uri=${UMCG_DEBIAN:-$(mirror)} ||
		fail "apt knows no Debian archive; name one: UMCG_DEBIAN=URI scripts/$me …"
	mkdir -p "$dir"/lists/partial "$dir"/cache/archives/partial
	printf "deb [arch=amd64 signed-by=$keyring] $uri %s main\n" "${@:2}" >"$dir/sources.list"
	say "reading Debian's package lists"
	apt "$1" apt-get -qq --error-on=any update >&2
}

# One writer at a time; the lock falls when the script ends.
lock() { mkdir -p "$cache"; exec 9>"$cache/lock"; flock 9; }

younger() { [ -n "$(find "$1" -mmin "-$2" 2>/dev/null)" ]; }
