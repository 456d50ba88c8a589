#!/bin/busybox sh
# The first process of a machine of tests/guard. Commands come over the second serial port, one a line as
# "NUMBER COMMAND"; the answer is what the command says, then "NUMBER STATUS" on a line of its own.
/bin/busybox mkdir -p /proc /sys /dev /tmp /bin /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
ip link set lo up
echo 1 >/proc/sys/kernel/panic_on_oops
echo 1 >/proc/sys/kernel/sysrq

serve() {
    stty -F /dev/ttyS1 raw -echo
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
(while :; do
    echo $((++beat)) >/tmp/beat.new && mv /tmp/beat.new /tmp/beat
    usleep 100000
done) &
serve &
# It is the kernel's first process: that ends when somebody asks for its death.
while [ ! -e /tmp/die ]; do sleep 1; done
exit 3
