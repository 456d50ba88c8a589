# What host a does: an agent, and commands over the second serial port, one a line as "NUMBER COMMAND"; the
# answer is what the command says, then "NUMBER STATUS". What the guests say goes to the third, the agent's
# log to the fourth.
mkdir -p /bin /sbin
/bin/busybox --install -s /bin
PATH=/opt/semper/bin:/bin:/usr/bin
export PATH
. /opt/semper/environment
mkdir -p "$TRIAL_IMAGES"
cp /opt/semper/counter.raw "$TRIAL_IMAGES/"
mkdir -p /var/lib/sempervirt
cp -a /opt/semper/state/. "$SEMPERVIRT_STATE_DIR/"
chmod -R go= "$SEMPERVIRT_STATE_DIR"
# As `semper guard install` leaves it, for an agent that loads the module by itself.
modules=/lib/modules/$(uname -r)
mkdir -p "$modules/updates"
cp /opt/semper/semper_guard.ko "$modules/updates/"
echo "updates/semper_guard.ko:" >"$modules/modules.dep"
echo 1 >/proc/sys/kernel/panic_on_oops
echo 1 >/proc/sys/kernel/sysrq
for port in 1 2 3; do stty -F /dev/ttyS$port raw -echo; done
"$TRIAL_PYTHON" -c "from sempervirt.daemon.main import main; main()" --ready-moves 2 --guard-presets /opt/semper/guard.toml \
    </dev/null >/dev/ttyS3 2>&1 &
"$TRIAL_PYTHON" -I /opt/semper/beats.py "$SEMPERVIRT_RUN_DIR" "$SEMPERVIRT_STATE_DIR" \
    </dev/null >/dev/ttyS2 2>/dev/ttyS3 &

serve() {
    exec 3<>/dev/ttyS1
    echo "0 0" >&3
    while read -r number line <&3; do
        (eval "$line") >/tmp/answer 2>&1 3>&- </dev/null
        status=$?
        cat /tmp/answer >&3
        echo "
$number $status" >&3
    done
}
serve &
while :; do sleep 3600; done
