#!/bin/busybox sh
# The first process. Finds the root disk, takes this boot's own files along as /vm, and becomes the
# first process there: `sh`, which reaps what is left behind, and runs the guest's program once.
b=/bin/busybox
if [ ! -d /vm/second ]; then
    $b mount -t devtmpfs dev /dev
    $b mount -t proc proc /proc
    $b mount -t sysfs sys /sys
    for module in /modules/*.ko; do
        $b insmod "$module" || echo "init: $module was not loaded" >/dev/console
    done
    tries=0
    until [ -b /dev/vda ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || { echo "init: no root disk" >/dev/console; $b poweroff -f; }
        $b sleep 0.1
    done
    $b mount -t ext4 /dev/vda /root || $b poweroff -f
    $b mount -t tmpfs -o mode=755 vm /root/vm
    $b cp -a /vm/. /root/vm/
    $b cp -a /bin/busybox /init /root/vm/
    $b mkdir /root/vm/second
    $b mount --move /dev /root/dev
    $b mount --move /proc /root/proc
    $b mount --move /sys /root/sys
    exec $b switch_root /root /vm/busybox sh /vm/init
fi
b=/vm/busybox
$b mount -t tmpfs -o mode=755 run /run
$b mkdir -p /dev/pts /dev/shm
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /dev/pts
$b mount -t tmpfs -o mode=1777 shm /dev/shm
for link in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    $b ln -s "/proc/self/${link#*:}" "/dev/${link%:*}"
done
$b mount -t securityfs none /sys/kernel/security
$b mount -t cgroup2 cgroup /sys/fs/cgroup
echo '+memory +pids +cpu' >/sys/fs/cgroup/cgroup.subtree_control
$b chmod 1777 /tmp /var/tmp
$b hostname guest
$b ip link set lo up
$b stty -F /dev/ttyS1 raw -echo
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
cd /
/vm/guest </dev/ttyS1 >/dev/ttyS1 2>/dev/console
$b sync
$b poweroff -f
