module example.com/dagrelay-publisher

go 1.22
