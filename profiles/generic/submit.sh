# A batch system of one machine: start the job script in the background and print its number.
nohup bash "$1" > "$1.out" 2>&1 &
echo $!
