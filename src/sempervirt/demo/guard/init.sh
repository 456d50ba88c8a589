#!/bin/busybox sh
# The first process of host a: drivers, disk, network, then the host's own `serve.sh` within the disk.
/bin/busybox --install -s /bin
PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/lib/$module"; done </lib/list
turns=0
until [ -b /dev/vda ] || [ $turns -ge 200 ]; do
    turns=$((turns + 1))
    usleep 50000
done
mount -t ext4 /dev/vda /root || poweroff -f
mount -o move /proc /root/proc
mount -o move /sys /root/sys
mount -o move /dev /root/dev
mkdir -p /root/dev/shm
mount -t tmpfs shm /root/dev/shm
mount -t tmpfs tmp /root/tmp
mount -t tmpfs run /root/run
mount -o bind /payload /root/opt/semper
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
exec chroot /root /bin/busybox sh /opt/semper/serve.sh
